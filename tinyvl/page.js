"use strict";
const cards = [...document.querySelectorAll("article")];
const sections = [...document.querySelectorAll("section")];
const filter = document.getElementById("filter"), sort = document.getElementById("sort");
const texts = cards.map((card) => (card.textContent + " " + (card.parentElement.parentElement
  .dataset.name || "") + " " + (card.title || "")).toLowerCase());

function apply() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let left = 0;
  cards.forEach((card, i) => {
    card.hidden = !words.every((word) => texts[i].includes(word));
    left += !card.hidden;
  });
  for (const one of sections) one.hidden = !one.querySelector("article:not([hidden])");
  document.getElementById("count").value = words.length ? `· ${left} of ${cards.length}` : "";
}

function order() {
  const [name, sign] = [sort.value.slice(1), sort.value[0] === "-" ? -1 : 1];
  const value = (card) => (name ? JSON.parse(card.dataset.sort)[name] : undefined);
  const rank = new Map(cards.map((card, i) => [card, [value(card), i]]));
  const compare = (a, b) => {
    const [[x, i], [y, j]] = [rank.get(a), rank.get(b)];
    if (x === y) return i - j;
    if (x === undefined || y === undefined) return x === undefined ? 1 : -1; // what has none: last
    return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  };
  for (const one of sections) {
    const box = one.querySelector(".wall, .row");
    box.append(...[...box.children].sort(compare));
  }
}

function move(key, from) {
  const at = from.getBoundingClientRect(), middle = at.left + at.width / 2;
  const seen = [...document.querySelectorAll("article:not([hidden])")];
  const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
  if (step) return seen[seen.indexOf(from) + step];
  const down = key === "ArrowDown";
  let best, least = Infinity;
  for (const card of seen) {
    const box = card.getBoundingClientRect();
    const away = down ? box.top - at.top : at.top - box.top;
    const cost = away * 3 + Math.abs(box.left + box.width / 2 - middle);
    if (away > 20 && cost < least) [best, least] = [card, cost];
  }
  return best;
}

function reach(card) {
  const place = card && card.querySelector("a.shown, audio, [tabindex]");
  if (!place) return;
  place.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest", inline: "nearest" });
}

function show(word) {
  const card = word.closest("article"), map = card.querySelector(".map");
  if (map && word.dataset.map) map.src = word.dataset.map;
  if (map) map.hidden = !word.dataset.map;
  const note = card.querySelector(".note");
  if (note) note.textContent = word.dataset.note || "";
}

filter.addEventListener("input", apply);
sort.addEventListener("change", order);
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === filter;
  if (event.key === "/" && !typing) filter.focus();
  else if (event.key === "Escape") { filter.value = ""; filter.blur(); apply(); }
  else if (event.key.startsWith("Arrow") && event.target.tagName !== "SELECT") {
    if (typing && event.key !== "ArrowDown") return;
    const here = event.target.closest("article");
    const next = here ? move(event.key, here) : document.querySelector("article:not([hidden])");
    if (!next) return;
    reach(next);
  } else return;
  event.preventDefault();
});
for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, (event) => {
  const word = event.target.closest(".word");
  if (word) show(word);
});
for (const kind of ["mouseout", "focusout"]) document.addEventListener(kind, (event) => {
  const word = event.target.closest(".word");
  const map = word && word.closest("article").querySelector(".map");
  if (map) map.hidden = true;
});
if (sort.value !== "+") order();

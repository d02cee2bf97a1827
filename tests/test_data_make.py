"""Questions made from captions."""

import json

import shell

from tinyvl.data_make import questions_of

DOGS = [
    "Two brown dogs running on the beach.",
    "two dogs are running on a beach",
    "A pair of dogs on the sand",
    "Two dogs play with a man",
    "Puppies at the sea.",
]


def asked(captions, key="a.jpg"):
    return dict(questions_of(captions, key))


def test_what_captions_agree_on_is_asked():
    found = asked(DOGS)
    assert [a for q, a in found.items() if "animal" in q] == [["dog"]]
    assert found["how many dogs are there?"] == ["two"]
    assert not any("color" in question for question in found)  # one caption alone says brown
    colours = asked(["a red bus", "The red bus stops.", "a bus", "a bus on a street"])
    assert colours["what color is the bus?"] == ["red"]
    assert [a for q, a in colours.items() if "vehicle" in q] == [["bus"]]


def test_what_captions_do_not_agree_on_is_not():
    assert not any("animal" in q for q in asked(["a dog", "a cat", "a horse", "a bird"]))
    two = asked(["a dog and a cat", "a cat by a dog", "dog, cat"])
    assert not any("animal" in question for question in two)
    assert "how many dogs are there?" not in asked(["two dogs", "two dogs", "three dogs"])


def test_what_somebody_does_has_all_the_answers():
    riding = ["A man riding a wave.", "a man surfing in the sea", "A man riding a big wave"]
    doing = asked(riding)["what is the man doing?"]
    assert doing == ["riding a wave", "surfing in the sea", "riding a big"]


def test_there_are_yeses_and_noes_and_they_are_true():
    answers = {}
    for i in range(40):
        for question, (answer, *_) in questions_of(DOGS, f"{i}.jpg"):
            if question.startswith("is there"):
                answers.setdefault(answer, set()).add(question)
    assert answers["yes"] == {"is there a dog in the picture?"}
    no = answers["no"]
    assert len(no) > 3
    assert not no & answers["yes"]
    assert not {f"is there a {name} in the picture?" for name in ("elephant", "airplane")} & no


def test_the_command_writes_a_set_that_training_reads(tmp_path):
    (tmp_path / "a.jpg").touch()
    line = {"image": "a.jpg", "captions": DOGS, "split": "train"}
    (tmp_path / "c.jsonl").write_text(json.dumps(line) + "\n")
    out = tmp_path / "q.jsonl"
    done = shell.run("data", "questions", tmp_path / "c.jsonl", "-o", out)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"image": "a.jpg", "split": "train"}.items() <= made[0].items()
    assert all(each["question"] and each["answers"] for each in made)
    both = tmp_path / "both.jsonl"
    other = tmp_path / "other_val.jsonl"
    other.write_text(json.dumps({"image": "a.jpg", "question": "who?", "answers": ["a dog"]}))
    assert shell.run("data", "convert", out, other, "-o", both).returncode == 0
    merged = [json.loads(line) for line in both.read_text().splitlines()]
    assert [each["split"] for each in merged] == ["train"] * len(made) + ["val"]

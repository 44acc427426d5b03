"""llama.cpp through llama-cpp-python's low-level interface, with a GGUF made beside the checkpoint."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

_BATCH_TOKENS = 2048
_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class _LlamaCpp:
    def __init__(self, checkpoint: str, dtype: str, threads: int) -> None:
        self._lib: Any = importlib.import_module("llama_cpp")
        self._numpy: Any = importlib.import_module("numpy")
        self._threads = threads
        options = self._lib.llama_model_default_params()
        options.n_gpu_layers = 0
        file = str(converted(checkpoint, dtype)).encode()
        self._model = self._lib.llama_model_load_from_file(file, options)
        assert self._model, f"llama.cpp cannot load {file}"
        self._vocab_size = json.loads((Path(checkpoint) / "config.json").read_text())["vocab_size"]
        self._batch = self._lib.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self.version = f"llama.cpp (llama-cpp-python {self._lib.__version__})"

    def run(self, prompts: Any, cold: bool) -> tuple[float, float, float]:
        context = self._new_context(prompts)
        begin, first = time.perf_counter(), 0.0
        # Prompts first, several in a batch; then a token of each sequence that goes on.
        fed, tokens = [0] * len(prompts), [[] for _ in prompts]
        while any(len(own) < wanted for own, (_, wanted) in zip(tokens, prompts, strict=True)):
            self._batch.n_tokens = 0
            rows: list[tuple[int, int]] = []  # which row of the batch gives which sequence's next token
            for n, (ids, wanted) in enumerate(prompts):
                if len(tokens[n]) == wanted:
                    continue
                known = ids + tokens[n]
                space = _BATCH_TOKENS - self._batch.n_tokens
                given = known[fed[n] : fed[n] + space]
                for token in given:
                    fed[n] += 1
                    self._add(token, fed[n] - 1, n, fed[n] == len(known))
                if given and fed[n] == len(known):
                    rows.append((self._batch.n_tokens - 1, n))
            assert self._lib.llama_decode(context, self._batch) == 0
            for row, n in rows:
                logits = self._lib.llama_get_logits_ith(context, row)
                values = self._numpy.ctypeslib.as_array(logits, shape=(self._vocab_size,))
                tokens[n].append(int(values.argmax()))
            if rows and not first:
                first = time.perf_counter() - begin
        total = time.perf_counter() - begin
        self._lib.llama_free(context)
        return first, total, total

    def _new_context(self, prompts: Any) -> Any:
        options = self._lib.llama_context_default_params()
        longest = max(len(ids) + wanted for ids, wanted in prompts)
        options.n_ctx, options.n_seq_max = len(prompts) * (-(-longest // 256) * 256), len(prompts)
        options.n_batch, options.n_ubatch = _BATCH_TOKENS, 512
        options.n_threads = options.n_threads_batch = self._threads
        context = self._lib.llama_init_from_model(self._model, options)
        assert context, "llama.cpp has no context"
        return context

    def _add(self, token: int, position: int, sequence: int, wants_logits: bool) -> None:
        batch, n = self._batch, self._batch.n_tokens
        batch.token[n], batch.pos[n] = token, position
        batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
        batch.logits[n] = wants_logits
        batch.n_tokens += 1


def converted(checkpoint: str, dtype: str) -> Path:
    """The checkpoint as GGUF without a vocabulary: made once, in its own folder."""
    folder = Path(checkpoint)
    out = folder / "model.gguf"
    if out.exists():
        return out
    gguf: Any = importlib.import_module("gguf")
    safetensors: Any = importlib.import_module("safetensors")
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(name)
            if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                count = heads if "q_proj" in name else kv_heads  # llama.cpp rotates neighbours, not halves
                halves = tensor.view(count, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            if tensor.dim() == 1:
                writer.add_tensor(_gguf_name(name), tensor.float().numpy())
            else:
                words = tensor.contiguous().view(dtype=importlib.import_module("torch").uint8).numpy()
                writer.add_tensor(_gguf_name(name), words, raw_dtype=gguf.GGMLQuantizationType[_TYPES[dtype]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.rename(out)


def _gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_LINEARS[rest]}.{kind}"


start = _LlamaCpp

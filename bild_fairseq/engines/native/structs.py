"""The structs of ``transformer.c``, field by field."""

from __future__ import annotations

import ctypes

from ...errors import BildError


def _fields(integers: str = "", pointers: str = "", doubles: str = "") -> list[tuple[str, type]]:
    return [
        *((name, ctypes.c_int64) for name in integers.split()),
        *((name, ctypes.c_double) for name in doubles.split()),
        *((name, ctypes.c_void_p) for name in pointers.split()),
    ]


class Linear(ctypes.Structure):
    _fields_ = _fields("in_ out type", "weight scale bias")


class Norm(ctypes.Structure):
    _fields_ = [*_fields("", "weight bias"), ("eps", ctypes.c_double)]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Linear) for name in ("qkv", "self_out", "source_query", "source_out", "fc1", "fc2")),
        *((name, Norm) for name in ("self_norm", "source_norm", "final_norm")),
    ]


class Stack(ctypes.Structure):
    _fields_ = [
        *_fields("dim heads head_dim ffn pre_norm causal attends_to_source activation gated start_row"),
        *_fields("", "embedding", "embed_scale score_scale"),
        ("embed_norm", Norm),
        ("output_norm", Norm),
        *_fields("", "layers"),
    ]


class Head(ctypes.Structure):
    _fields_ = [("norm", Norm), ("vocabulary", Linear), *_fields("", "types")]


class State(ctypes.Structure):
    _fields_ = [
        *_fields("sentences capacity layer_size", "positions biases"),
        *_fields("reach", "keys values hidden"),
        *_fields("source_capacity", "source_lengths source_keys source_values"),
    ]


class Pass(ctypes.Structure):
    _fields_ = [
        *_fields("sentences", "rows starts counts"),
        *_fields("tokens", "token x"),
        *_fields("first end own_first own_end keep", "head"),
        *_fields("predictions", "selected logits"),
        *_fields("logits_stride", "log_normalizer"),
        *_fields("threads room", "workspace"),
    ]


class Constraints(ctypes.Structure):
    _fields_ = _fields("pad unk eos min_len max_len", "prefix_lengths", "unk_penalty")


class Draft(ctypes.Structure):
    _fields_ = [
        ("constraints", Constraints),
        ("threshold", ctypes.c_double),
        *_fields("limit", "order made tokens lprobs"),
    ]


class Verification(ctypes.Structure):
    _fields_ = [("constraints", Constraints), *_fields("", "drafted best best_lprobs drafted_lprobs")]


MIRRORED = (Linear, Norm, Layer, Stack, Head, State, Pass, Constraints, Draft, Verification)


def check_sizes(library: ctypes.CDLL) -> None:
    """Compares the structs with those that were compiled.

    Raises:
        BildError: one has another size.
    """
    for struct in MIRRORED:
        size = library.bild_size(struct.__name__.encode())
        if size != ctypes.sizeof(struct):
            raise BildError(
                f"transformer.c and structs.py disagree on the size of {struct.__name__}, {size} and "
                f"{ctypes.sizeof(struct)} bytes: install the package anew"
            )

"""The same work by other software, to hold this project against: sentence-transformers as it comes, tuned, and in int8.

sentence-transformers' own ONNX and OpenVINO backends need optimum, whose releases admit neither transformers 5 nor the pinned
safetensors. So the two runtimes stand directly under sentence-transformers: it tokenises, sorts and pools as ever, and only
the transformer's network is another. The one door for onnxruntime, openvino and nncf.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from matryoshka import model, rates

Run = Callable[[Mapping[str, npt.NDArray[np.int64]]], npt.NDArray[np.float32]]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUT = "last_hidden_state"
_OPSET = 18
_CALIBRATION_TEXTS = 300  # what NNCF's own default takes
_SEARCH_DOCUMENTS = 1_024
_SEARCH_BATCHES = 4  # at least so many of the largest batches
_SEARCH_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to encode with other software.

    Attributes:
        batch_sizes: Which ones to try, by device; it does not run on a device that is missing here.
        packages: What must be installed.
    """

    batch_sizes: Mapping[str, tuple[int, ...]]
    packages: tuple[str, ...] = ()


PEERS = {
    "default": Peer({"cpu": (32,), "cuda": (32,)}),
    "tuned": Peer({"cpu": (4, 8, 16, 32, 64, 128, 256), "cuda": (128, 256, 512, 1_024, 2_048)}),
    "onnx_int8": Peer({"cpu": (4, 8, 16, 32)}, ("onnx", "onnxruntime")),
    "openvino_int8": Peer({"cpu": (8, 16, 32, 64)}, ("openvino", "nncf")),
}


def why_not(name: str, device: str) -> str:
    """Returns why a peer cannot run here; empty where it can.

    >>> why_not("onnx_int8", "cuda")
    'runs on CPUs only'
    """
    if device not in PEERS[name].batch_sizes:
        return "runs on CPUs only"
    missing = [package for package in PEERS[name].packages if importlib.util.find_spec(package) is None]
    return (
        f"not installed: {', '.join(missing)}. Run pip install --constraint .constraints/cpu.txt --editable '.[bench]'."
        if missing
        else ""
    )


@dataclass(frozen=True, slots=True)
class Setup:
    """How a peer runs on this machine.

    Attributes:
        name: Of the peer.
        folder: The model.
        device: ``cpu`` or ``cuda``.
        precision: Of its matrix products: ``float32``, ``bf16`` or ``int8``.
        batch_size: Documents in a forward pass.
        network: The converted network; None where torch runs the model's own.
    """

    name: str
    folder: Path
    device: str
    precision: str
    batch_size: int
    network: Path | None = None


class PeerEncoder:
    """A peer, loaded; it computes with the threads that torch takes by default.

    Attributes:
        num_threads: How many these are.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._loaded = model.load(setup.folder, setup.device).eval()
        self.num_threads = torch.get_num_threads()
        if setup.precision == "bf16":
            for parameter in self._loaded.parameters():  # as our encoder does: rotary frequencies must stay exact
                parameter.data = parameter.data.to(torch.bfloat16)
        if setup.network:
            transformer: Any = self._loaded[0]
            transformer.model = _Runtime(transformer.model.config, _OPENERS[setup.name](setup.network, self.num_threads))

    def encode(self, texts: Sequence[str], batch_size: int | None = None) -> npt.NDArray[np.float32]:
        """Returns the vectors of documents as the model gives them, in the order of the texts.

        Shapes: [N, D].
        """
        batch_size = batch_size or self._setup.batch_size
        return np.asarray(self._loaded.encode_document(list(texts), batch_size=batch_size, show_progress_bar=False))


def prepare(name: str, folder: Path, device: str, texts: Sequence[str], scratch: Path) -> Setup:
    """Returns how a peer runs fastest: its network converted, its precision and its batch size measured.

    What this needs in memory stays in the process: one that is to be measured opens the result anew.

    Args:
        name: A key of ``PEERS``.
        folder: The model.
        device: ``cpu`` or ``cuda``.
        texts: The documents that are to be encoded; batch sizes are tried, and int8 is calibrated, on some of them.
        scratch: An existing folder for the converted network.
    """
    sizes = PEERS[name].batch_sizes[device]
    if name in _BUILDERS:
        with _silence():
            setup = Setup(name, folder, device, "int8", sizes[0], _BUILDERS[name](folder, texts, scratch))
    else:
        precision = rates.best_precision(device) if name == "tuned" else "float32"
        setup = Setup(name, folder, device, precision, sizes[0])
    if len(sizes) == 1:
        return setup
    return dataclasses.replace(setup, batch_size=_best_batch_size(PeerEncoder(setup), texts, sizes))


def _best_batch_size(encoder: PeerEncoder, texts: Sequence[str], sizes: Sequence[int]) -> int:
    """Returns the batch size that encodes a document fastest."""
    ordered = sorted(texts, key=len, reverse=True)
    num_documents = max(_SEARCH_DOCUMENTS, _SEARCH_BATCHES * max(sizes))
    seconds = dict.fromkeys(sizes, math.inf)
    for _ in range(_SEARCH_ROUNDS):  # interleaved, so that a disturbance hits them all
        for size in sizes:
            sample = spread_batches(ordered, size, num_documents)
            start = time.perf_counter()
            with contextlib.suppress(torch.OutOfMemoryError):
                encoder.encode(sample, size)
                seconds[size] = min(seconds[size], (time.perf_counter() - start) / len(sample))
    return min(sizes, key=lambda size: seconds[size])


def spread_batches(ordered: Sequence[str], batch_size: int, num_documents: int) -> list[str]:
    """Returns whole batches that lie evenly over texts sorted by length: per text they cost what all of them cost.

    A small sample, sorted by itself, would have batches of more unequal lengths, and so more padding, than all texts have.

    >>> spread_batches("abcdefghijkl", batch_size=2, num_documents=6)
    ['b', 'c', 'f', 'g', 'j', 'k']
    """
    count = max(min(num_documents, len(ordered)) // batch_size, 1)
    starts = ((np.arange(count) + 0.5) * len(ordered) / count - batch_size / 2).clip(0).astype(int)
    return [text for start in starts.tolist() for text in ordered[start : start + batch_size]]


class _Runtime(torch.nn.Module):
    """Stands where sentence-transformers has a transformer's network, and asks another runtime."""

    def __init__(self, config: Any, run: Run) -> None:
        super().__init__()
        self.config, self._run = config, run

    def forward(self, **features: Any) -> BaseModelOutput:
        """Returns the vectors of tokens.

        Shapes: features [batch, length]; vectors [batch, length, hidden].
        """
        arrays = {name: value.numpy() for name, value in features.items() if name in _INPUTS}
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self._run(arrays)))


class _Bare(torch.nn.Module):
    """A network as exporters take it: tensors in by position, one tensor out."""

    def __init__(self, network: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self._names = network, tuple(names)

    def forward(self, *features: Tensor) -> Tensor:
        hidden: Tensor = self.network(**dict(zip(self._names, features, strict=True)))[0]
        return hidden


def _open_bare(folder: Path, texts: Sequence[str]) -> tuple[Any, _Bare, dict[str, Tensor]]:
    """Returns a model, its network for an exporter, and an example of what goes in, with padding."""
    loaded = model.load(folder, "cpu").eval()
    features = loaded.preprocess([texts[0], " ".join(texts[:2])])
    example = {name: features[name] for name in _INPUTS if name in features}
    return loaded, _Bare(loaded[0].model, list(example)).eval(), example  # type: ignore[arg-type]


def _build_onnx(folder: Path, texts: Sequence[str], scratch: Path) -> Path:
    """Returns the network as ONNX, weights in int8 per channel; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    _, bare, example = _open_bare(folder, texts)
    whole, small = scratch / "float32.onnx", scratch / "int8.onnx"
    torch.onnx.export(
        bare,
        tuple(example.values()),
        str(whole),
        input_names=list(example),
        output_names=[_OUTPUT],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in (*example, _OUTPUT)},
        opset_version=_OPSET,
        dynamo=False,
    )
    quantize_dynamic(whole, small, weight_type=QuantType.QInt8, per_channel=True)
    return small


def _open_onnx(network: Path, num_threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    session = onnxruntime.InferenceSession(str(network), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]

    def run(features: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        return np.asarray(session.run(None, {name: features[name] for name in names})[0])

    return run


def _build_openvino(folder: Path, texts: Sequence[str], scratch: Path) -> Path:
    """Returns the network for OpenVINO, weights and activations in int8, their ranges taken from some of the documents."""
    _keep_telemetry_out()
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    loaded, bare, example = _open_bare(folder, texts)
    anything = (openvino.PartialShape([-1, -1]), openvino.Type.i64)
    with torch.no_grad():
        network = openvino.convert_model(bare, example_input=tuple(example.values()), input=[anything] * len(example))
    for port, name in zip(network.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    ranges = []
    for text in texts[:: max(len(texts) // _CALIBRATION_TEXTS, 1)][:_CALIBRATION_TEXTS]:
        features = loaded.preprocess([text])  # one at a time: padding is no document
        ranges.append({name: features[name].numpy() for name in example})
    quantised = nncf.quantize(
        network,
        nncf.Dataset(ranges),
        subset_size=len(ranges),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=True,
    )
    openvino.save_model(quantised, scratch / "int8.xml", compress_to_fp16=False)
    return scratch / "int8.xml"


def _open_openvino(network: Path, num_threads: int) -> Run:
    _keep_telemetry_out()
    import openvino

    settings = {"INFERENCE_NUM_THREADS": num_threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(network), "CPU", settings)
    names = [port.any_name for port in compiled.inputs]
    request = compiled.create_infer_request()

    def run(features: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        return np.asarray(request.infer({name: features[name] for name in names}, share_inputs=True)[0])

    return run


_BUILDERS = {"onnx_int8": _build_onnx, "openvino_int8": _build_openvino}
_OPENERS = {"onnx_int8": _open_onnx, "openvino_int8": _open_openvino}


def _keep_telemetry_out() -> None:
    """Makes OpenVINO and NNCF find no telemetry package: with it, they report their use to its makers, unasked."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drops what exporters print, log and warn of while the block runs: advice on how to export, and progress bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""The rivals' side of rivals.py, run by a Python of their own: neither packlight nor torch is imported here.

    PYTHON benchmarks/rival_tools.py TOOL FOLDER [--transformer]   # FOLDER/fp32.onnx, calibration.npz -> TOOL.onnx or .xml
    PYTHON benchmarks/rival_tools.py turns FOLDER [--clock wall]   # run FOLDER/openvino.xml once for each line that comes in

Tools:

    ort        quantize_static(activation_type=QUInt8, weight_type=QInt8, per_channel=True): QDQ, all op types
    optimum    AutoQuantizationConfig.avx512_vnni(is_static=True, per_channel=True) through its ORTQuantizer, MinMax
    nncf       nncf.quantize on the ONNX model
    openvino   nncf.quantize on OpenVINO's own model

The first two are given what quant_pre_process makes of the graph, as their manuals ask; NNCF is told of transformers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def save(path: Path, batches: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Batches as one .npz, their keys numbered."""
    np.savez(
        path, **{f"{number}/{name}": array for number, batch in enumerate(batches) for name, array in batch.items()}
    )


def load(path: Path) -> list[Batch]:
    """What save() wrote."""
    batches: dict[int, Batch] = {}
    with np.load(path) as file:
        for key in file.files:
            number, _, name = key.partition("/")
            batches.setdefault(int(number), {})[name] = file[key]
    return [batches[number] for number in sorted(batches)]


def _reader(batches: Iterable[Batch]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> Batch | None:
            return next(self.rest, None)

    return Reader()


def _pre_processed(folder: Path) -> Path:
    """fp32.onnx after quant_pre_process; its symbolic shape inference, a part that may be skipped, fails on some graphs."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    out = folder / "clean.onnx"
    if not out.exists():
        try:
            quant_pre_process(folder / "fp32.onnx", out, auto_merge=True)
        except Exception:  # it raises whatever sympy, onnx or its own dictionaries do
            quant_pre_process(folder / "fp32.onnx", out, skip_symbolic_shape=True)
    return out


def ort(folder: Path, transformer: bool) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    reader = _reader(load(folder / "calibration.npz"))
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    clean, out = _pre_processed(folder), folder / "ort.onnx"
    quantize_static(clean, out, reader, quant_format=QuantFormat.QDQ, per_channel=True, **types)


def optimum(folder: Path, transformer: bool) -> None:
    from onnxruntime.quantization import CalibrationMethod
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
    from optimum.onnxruntime.configuration import CalibrationConfig

    asked = AutoQuantizationConfig.avx512_vnni(is_static=True, per_channel=True)
    made = ORTQuantizer(_pre_processed(folder))
    ranges = CalibrationConfig(
        dataset_name="",
        dataset_config_name="",
        dataset_split="",
        dataset_num_samples=0,
        method=CalibrationMethod.MinMax,
    )
    # its fit() wants a data set of the hub's library; these are the three steps it takes
    made._calibrator = ranges.create_calibrator(
        onnx_model_path=str(made.onnx_model_path),
        operators_to_quantize=list(asked.operators_to_quantize),
        augmented_model_name=str(folder / "augmented.onnx"),
    )
    made._calibrator.collect_data(_reader(load(folder / "calibration.npz")))
    made.quantize(asked, folder / "optimum", calibration_tensors_range=made.compute_ranges())
    (folder / "optimum" / "clean_quantized.onnx").replace(folder / "optimum.onnx")


def nncf(folder: Path, transformer: bool) -> None:
    import onnx

    onnx.save(_nncf(onnx.load(folder / "fp32.onnx"), folder, transformer), folder / "nncf.onnx")


def openvino(folder: Path, transformer: bool) -> None:
    import openvino

    model = _nncf(openvino.convert_model(folder / "fp32.onnx"), folder, transformer)
    openvino.save_model(model, folder / "openvino.xml", compress_to_fp16=False)


def _nncf(model: Any, folder: Path, transformer: bool) -> Any:
    import nncf

    batches = load(folder / "calibration.npz")
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), model_type=kind)


def turns(folder: Path, clock: Callable[[], float]) -> None:
    """Open openvino.xml, write openvino.npz, the outputs of the held-out batches; then time the first batch once a line.

    Prints "ready PRECISION" when the outputs are written, and after each line that comes in the seconds of one run.
    """
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(folder / "openvino.xml", "CPU", settings)
    heldout = load(folder / "heldout.npz")
    names = [min(output.names) for output in model.outputs]
    request = model.create_infer_request()
    save(
        folder / "openvino.npz",
        ({name: request.infer(batch)[i].copy() for i, name in enumerate(names)} for batch in heldout),
    )
    print("ready", model.get_property("INFERENCE_PRECISION_HINT"), flush=True)
    for _ in sys.stdin:
        start = clock()
        request.infer(heldout[0])
        print(clock() - start, flush=True)


TOOLS = {"ort": ort, "optimum": optimum, "nncf": nncf, "openvino": openvino}


def main() -> None:
    """Read the arguments; quantize, or take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=[*TOOLS, "turns"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--transformer", action="store_true", help="NNCF is told so")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="of turns")
    given = parser.parse_args()
    if given.tool == "turns":
        turns(given.folder, CLOCKS[given.clock])
    else:
        TOOLS[given.tool](given.folder, given.transformer)


if __name__ == "__main__":
    main()

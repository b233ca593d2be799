"""Find where in the network a form begins to differ: the outputs of its parts side by side, on one tile.

The gate reports *that* two forms differ. This module reports from which module on: patch embedding, each transformer
block, each step of the decoder. It uses the module names that ``graph.name_by_module`` gave to the nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cellseg_deploy.models.spec import INPUT_NAME
from cellseg_export.forms.deploy_module import DeployModule
from cellseg_train.checkpoint import LoadedNetwork

# Tolerance by the candidate's precision, as a share of the largest value of a module's output: fp32 forms stayed
# below 1e-5; half rounds each value to 5e-4 of itself, and errors add up from block to block.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "mixed": 2e-2, "bf16": 0.1, "int8": 0.3}


def locate_fault(
    network: LoadedNetwork, path: Path, tile_nhwc: npt.NDArray[np.uint8], *, tolerance: float = TOLERANCE["fp32"]
) -> str:
    """A sentence naming the first module where the ``.onnx`` file ``path`` computes something else than PyTorch.

    ``tile_nhwc``: (1, S, S, 3). Empty if no module differs by more than ``tolerance`` of its largest value, or the
    nodes of the file carry no module names.
    """
    expected = _outputs_in_torch(network, tile_nhwc)
    got = _outputs_in_onnx(path, list(expected), tile_nhwc)
    for module, value in expected.items():
        if module not in got or got[module].shape != value.shape:
            continue  # fused with the next node
        scale = float(np.abs(value).max()) or 1.0
        difference = float(np.abs(got[module] - value).max()) / scale
        if not difference <= tolerance:
            return (
                f"the two diverge at {module}: its output differs by {difference:.2g} of its largest value; look there"
            )
    return ""


def parts(module: DeployModule) -> dict[str, nn.Module]:
    """The modules to compare, by their names in the exported graph, in the order in which they run."""
    net = module.net
    found: dict[str, nn.Module] = {"normalise": module.normalise, "encoder.patch_embed": net.encoder.patch_embed}
    found |= {f"encoder.blocks.{i}": block for i, block in enumerate(net.encoder.blocks)}
    found["encoder.norm"] = net.encoder.norm
    if net.branch is not None:
        found |= {f"branch.{name}": child for name, child in net.branch.named_children()}
    found["decoder.project"] = net.decoder.project
    found |= {f"decoder.steps.{i}": step for i, step in enumerate(net.decoder.steps)}
    found["decoder.head"] = net.decoder.head
    if net.decoder.class_head is not None:
        found["decoder.class_head"] = net.decoder.class_head
    return found


def _outputs_in_torch(
    network: LoadedNetwork, tile_nhwc: npt.NDArray[np.uint8]
) -> dict[str, npt.NDArray[np.floating[Any]]]:
    module = DeployModule(network.net).eval()
    outputs: dict[str, npt.NDArray[np.floating[Any]]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            outputs[name] = output.float().cpu().numpy()

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in parts(module).items()]
    try:
        device = next(network.net.parameters()).device
        with torch.inference_mode():
            module(torch.tensor(tile_nhwc, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _outputs_in_onnx(
    path: Path, modules: list[str], tile_nhwc: npt.NDArray[np.uint8]
) -> dict[str, npt.NDArray[np.floating[Any]]]:
    import onnx

    from cellseg_deploy.backends.telemetry import import_onnxruntime

    onnxruntime = import_onnxruntime()

    model = onnx.load(path, load_external_data=False)
    last: dict[str, str] = {}  # module -> output of its last node
    for node in model.graph.node:
        for module in modules:
            if node.name.startswith((f"{module}/", f"{module}.")):
                last[module] = node.output[0]
    known = {value.name for value in model.graph.output}
    for name in dict.fromkeys(last.values()):
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    data = model.SerializeToString()
    del model
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    values = session.run(list(last.values()), {INPUT_NAME: tile_nhwc})
    return dict(zip(last, values, strict=True))

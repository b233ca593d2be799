"""A model of ours in KServe's own server; see runtime_mlserver.py. Run as a program with the server's options."""

import json
import os
from pathlib import Path

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Cells(Model):
    def __init__(self) -> None:
        super().__init__("cells")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        self.told = json.loads(Path(os.environ["PARAMETERS"]).read_text())
        self.ready = True

    def get_input_types(self) -> list[dict]:
        (given,) = self.session.get_inputs()
        return [{"name": given.name, "datatype": "UINT8", "shape": [-1, *given.shape[1:]]}]

    def get_output_types(self) -> list[dict]:
        (answer,) = self.session.get_outputs()
        return [{"name": answer.name, "datatype": "FP32", "shape": [-1, *answer.shape[1:]]}]

    def predict(
        self, payload: InferRequest, headers: dict | None = None, response_headers: object = None
    ) -> InferResponse:
        (probabilities,) = self.session.run(["probabilities"], {"tiles": payload.inputs[0].as_numpy()})
        output = InferOutput("probabilities", list(probabilities.shape), "FP32")
        output.set_data_from_numpy(probabilities, binary_data=True)
        return InferResponse(payload.id or "", self.name, [output], parameters=self.told)


if __name__ == "__main__":
    ModelServer().start([Cells()])

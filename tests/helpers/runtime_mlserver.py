"""A model of ours in MLServer, run by an environment that has mlserver and onnxruntime.

MODEL: the .onnx file. PARAMETERS: a JSON file with the parameters of the entry's config.pbtxt.
"""

import json
import os
from pathlib import Path

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse, Parameters


class Cells(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        self.parameters = json.loads(Path(os.environ["PARAMETERS"]).read_text())
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        tiles = NumpyCodec.decode_input(payload.inputs[0])
        (probabilities,) = self.session.run(["probabilities"], {"tiles": tiles})
        return InferenceResponse(
            model_name=self.name,
            outputs=[NumpyCodec.encode_output("probabilities", probabilities)],
            parameters=Parameters(**self.parameters),
        )

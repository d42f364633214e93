"""Runs in the environment of optimum-onnx, with nothing of this project at hand: ``optimum_onnx.py FOLDER THREADS``."""

import json
import sys

import numpy as np
import onnxruntime as ort
from optimum.onnxruntime import ORTModelForSpeechSeq2Seq
from transformers import AutoTokenizer, WhisperFeatureExtractor

folder, threads = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = int(threads)
model = ORTModelForSpeechSeq2Seq.from_pretrained(folder, session_options=options, local_files_only=True)
extractor = WhisperFeatureExtractor.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
told = {"task": "transcribe"} if getattr(model.generation_config, "lang_to_id", None) else {}
for line in sys.stdin:
    asked = json.loads(line)
    samples = np.fromfile(asked["samples"], "<f4")
    features = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features
    language = {"language": asked["language"]} if told else {}
    tokens = model.generate(features, **told, **language, num_beams=1, do_sample=False)[0]
    print(json.dumps({"text": tokenizer.decode(tokens, skip_special_tokens=True)}), flush=True)

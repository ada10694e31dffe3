# SentencePiece is not a dependency of kvjax; this runs in an interpreter of its own.
# pyright: reportMissingImports=false
"""What SentencePiece makes of texts.

python tests/sentencepiece_reference.py MODEL TEXTS.json
"""

import json
import sys

import sentencepiece

with open(sys.argv[2]) as file:
    texts = json.load(file)
model = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
print(json.dumps([model.encode(text) for text in texts]))

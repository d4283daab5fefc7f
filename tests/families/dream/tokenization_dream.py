"""A tokenizer in plain Python, as Dream's: there is no tokenizer.json."""

import json
import re
from pathlib import Path

from transformers import PreTrainedTokenizer


class DreamTokenizer(PreTrainedTokenizer):
    """Words that vocab.json has, and single characters."""

    vocab_files_names = {"vocab_file": "vocab.json"}

    def __init__(self, vocab_file, **options):
        self.ids = json.loads(Path(vocab_file).read_text())
        self.names = {number: token for token, number in self.ids.items()}
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.ids)

    def get_vocab(self):
        return self.ids | self.added_tokens_encoder

    def _tokenize(self, text):
        tokens = []
        for piece in re.findall(r" ?\w+|\s|[^\w\s]", text):
            tokens += [piece] if piece in self.ids else list(piece)
        return tokens

    def _convert_token_to_id(self, token):
        return self.ids[token]

    def _convert_id_to_token(self, index):
        return self.names[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def decode(self, token_ids, **options):
        return super().decode(token_ids, **options | {"spaces_between_special_tokens": False})

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory) / "vocab.json"
        path.write_text(json.dumps(self.ids))
        return (str(path),)

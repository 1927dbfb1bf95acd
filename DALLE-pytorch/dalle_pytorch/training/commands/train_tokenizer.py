"""Learns a byte-pair encoding."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dalle_pytorch.errors import FileError
from dalle_pytorch.settings import option
from dalle_pytorch.training.settings import DataSettings


@dataclass
class TrainTokenizerSettings(DataSettings):
    """Learns the byte-pair encoding of captions and writes it as a tokenizer.json.

    python DALLE-pytorch/train_tokenizer.py --image_text_folder pictures --output tokenizer.json

    --image_text_folder may also be a text file of captions, one a line.
    """

    title = "tokenizer"
    takes_config = True

    count: int | None = option(None, "most captions to use (default: all; of a registered data set 20000)", low=1)
    vocab_size: int = option(4096, "the most tokens there may be", low=3)
    output: str = option("tokenizer.json", "file to write")


def main(argv: Sequence[str] | None = None) -> None:
    settings = TrainTokenizerSettings.parse(argv)
    from dalle_pytorch.data.captions import all_captions
    from dalle_pytorch.data.loading import Skipped, describe_skipped
    from dalle_pytorch.files.atomic import write_text
    from dalle_pytorch.tokenizers.hug import train_bpe

    class Captions:
        """All captions, as often as they are asked for; what was skipped and used counts the last time."""

        def __iter__(self) -> Iterator[str]:
            self.skipped, self.used = Skipped(), 0
            for caption in all_captions(settings.image_text_folder, self.skipped, wds=settings.wds,
                                        caption_key=settings.caption_key, count=settings.count,
                                        commands=settings.commands):  # fmt: skip
                self.used += 1
                yield caption

    captions = Captions()
    tokenizer = train_bpe(captions, settings.vocab_size)
    if not captions.used:
        raise FileError(f"{settings.image_text_folder} holds no captions")
    write_text(settings.output, tokenizer.to_str(pretty=True) + "\n")
    if captions.skipped.reasons:
        print(f"skipped {describe_skipped(captions.skipped.reasons)}", file=sys.stderr)
    print(f"{settings.output}: {tokenizer.get_vocab_size()} tokens from {captions.used} captions")

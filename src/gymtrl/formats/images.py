"""Images of a conversation: read from data URIs, and given their tokens by the model's own processor.

A template writes one placeholder for an image; the processor makes of it as many tokens as the model has for the image.
The engine finds what carries loss in the text, so the same tokens are made here from the text that the processor wrote
out, and must be what the processor itself makes.
"""

from __future__ import annotations

import base64
import binascii
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from gymtrl.errors import UserError
from gymtrl.formats.checks import Refusal
from gymtrl.formats.spans import Span
from gymtrl.models.fingerprint import model_file
from gymtrl.rollouts.record import Message

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_SHOWN = 60  # characters of an address in a detail


@dataclass(frozen=True)
class Expanded:
    """A rendered text with the processor's tokens in place of each image's placeholder.

    Attributes:
        text (`str`): The text.
        spans (`tuple[Span, ...]`): The trained characters in it.
        ids (`list[int]`): The tokens that the processor makes.
    """

    text: str
    spans: tuple[Span, ...]
    ids: list[int]


def has_processor(model: str) -> bool:
    """Whether the model comes with a processor, maybe for images."""
    return any(model_file(model, name) is not None for name in _PROCESSOR_FILES)


def load_processor(model: str, *, trust_remote_code: bool = False) -> ProcessorMixin | None:
    """Loads the processor of a model that takes images; `None` where the model takes none.

    Args:
        model (`str`): Folder or hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code from the model's repository.

    Raises:
        UserError: The model has a processor that does not load, or that does not tell where an image's tokens stand.
    """
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"the rollouts hold images, and the processor of model '{model}' cannot be loaded: {lines[0]}",
            remedy="install what it names; many processors need torchvision",
        ) from error
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
        return None
    told = type(processor).replace_image_token is not ProcessorMixin.replace_image_token
    if not told or not getattr(processor, "image_token", None):
        raise UserError(
            f"{type(processor).__name__} does not tell where an image's tokens stand",
            remedy="choose another model, or filter for rows without images",
        )
    if processor.chat_template:  # where there are two, this is the one with images
        processor.tokenizer.chat_template = processor.chat_template
    return processor


def read_images(messages: Iterable[Message]) -> list[bytes] | Refusal:
    """The images of messages, in order, as the files that the data URIs hold; or why one cannot be had."""
    files: list[bytes] = []
    for message in messages:
        for uri in message.images:
            found = _embedded(uri)
            if isinstance(found, Refusal):
                return found
            files.append(found)
    return files


def expand(
    text: str, spans: Sequence[Span], messages: Sequence[Message], processor: ProcessorMixin
) -> Expanded | Refusal:
    """Puts the images' tokens into a rendered text.

    Args:
        text (`str`): As the template wrote it.
        spans (`Sequence[Span]`): The trained characters in it.
        messages (`Sequence[Message]`): What the text shows.
        processor (`ProcessorMixin`): Of the model.

    Returns:
        `Expanded`: What the processor makes of it. Or `Refusal`: an image cannot be used, or not all of them are shown.
    """
    files = read_images(messages)
    images = _opened(files) if isinstance(files, list) else files
    if isinstance(images, Refusal):
        return images
    token = processor.image_token
    if text.count(token) != len(images):
        where = any(token in part for m in messages for part in (m.content, m.reasoning_content or ""))
        why = "a message's text holds the placeholder of an image" if where else "the chat template leaves images out"
        return Refusal("image_token_in_text", why) if where else Refusal("images_lost", why)
    try:
        made = processor(
            text=[text],
            images=[images] if images else None,
            add_special_tokens=False,
            return_text_replacement_offsets=True,
        )
    except Exception as error:  # processors raise whatever an image of odd size or kind makes them stumble over
        return Refusal("image_refused", f"the model's processor: {type(error).__name__}: {error}"[:300])
    shown = made["text_replacement_offsets"][0] if images else []
    return Expanded(*_written_out(text, spans, shown), list(made["input_ids"][0]))


def _written_out(text: str, spans: Sequence[Span], shown: Sequence[dict[str, Any]]) -> tuple[str, tuple[Span, ...]]:
    pieces, position, moved = [], 0, list(spans)
    for entry in shown:
        start, end = entry["span"]
        pieces += [text[position:start], entry["replacement"]]
        position = end
        more = len(entry["replacement"]) - (end - start)
        moved = [(a + more * (end <= s[0]), b + more * (end <= s[1])) for (a, b), s in zip(moved, spans, strict=True)]
    return "".join([*pieces, text[position:]]), tuple(moved)


def _embedded(uri: str) -> bytes | Refusal:
    head, _, payload = uri.partition(",")
    if head[:5].lower() != "data:":
        return Refusal("image_not_embedded", f"the row only names an image: {uri[:_SHOWN]}; nothing is downloaded")
    if not head.lower().endswith(";base64"):
        return Refusal("image_unreadable", f"the data URI of an image is not in base64: {head[:_SHOWN]}")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        return Refusal("image_unreadable", f"the base64 of an image is damaged: {error}")


def _opened(files: list[bytes]) -> list[Any] | Refusal:
    """The images as `datasets` will hand them to the trainer, after a look at each that trusts nothing."""
    from datasets import Image as ImageColumn
    from PIL import Image, UnidentifiedImageError

    column = ImageColumn()
    images = []
    for data in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                Image.open(BytesIO(data), formats=_FORMATS).load()
                images.append(column.decode_example({"bytes": data, "path": None}))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            return Refusal("image_too_large", str(error))
        except UnidentifiedImageError:
            return Refusal("image_unreadable", f"an image is none of {', '.join(_FORMATS)}")
        except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
            return Refusal("image_unreadable", f"an image is damaged: {type(error).__name__}: {error}"[:300])
    return images

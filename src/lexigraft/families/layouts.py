"""Which ids the pieces of a SentencePiece `.model` have: the tokenizer class decides.

Most classes take the place in the file as the id. Those that came from fairseq (XLM-R, mBART)
put their own special tokens before the pieces and behind them, Pegasus puts 103 before them,
T5 its sentinels behind them. The lists follow `convert_from_spm` of each class in transformers 5
(convert_slow_tokenizer.py), which give the ids of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexigraft.errors import LexigraftError
from lexigraft.files import read_settings

# Classes that move pieces in ways of their own: only their tokenizer.json says which id is what.
_UNREADABLE = frozenset(
    {"CamembertTokenizer", "BarthezTokenizer", "NllbTokenizer", "SeamlessM4TTokenizer",
     "XGLMTokenizer", "M2M100Tokenizer", "PLBartTokenizer", "Speech2TextTokenizer",
     "BartphoTokenizer", "DebertaV2Tokenizer", "MarianTokenizer", "XLMProphetNetTokenizer",
     "ErnieMTokenizer", "CpmTokenizer", "FNetTokenizer"}
)  # fmt: skip
_CLASS_OF_MODEL_TYPE = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers"), "T5Tokenizer"),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), "XLMRobertaTokenizer"),
    **dict.fromkeys(("pegasus", "bigbird_pegasus"), "PegasusTokenizer"),
    "mbart": "MBartTokenizer",
}
_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
_MBART = (
    "ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN",
    "it_IT", "ja_XX", "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO",
    "ru_RU", "si_LK", "tr_TR", "vi_VN", "zh_CN",
)  # fmt: skip
_MBART50 = (
    "af_ZA", "az_AZ", "bn_IN", "fa_IR", "he_IL", "hr_HR", "id_ID", "ka_GE", "km_KH", "mk_MK",
    "ml_IN", "mn_MN", "mr_IN", "pl_PL", "ps_AF", "pt_XX", "sv_SE", "sw_KE", "ta_IN", "te_IN",
    "th_TH", "tl_XX", "uk_UA", "ur_PK", "xh_ZA", "gl_ES", "sl_SI",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The vocabulary of a class: `head`, the pieces from `skip` on, `tail`."""

    head: tuple[str, ...] = ()
    skip: int = 0
    tail: tuple[str, ...] = ()

    def texts(self, pieces: Sequence[str]) -> dict[int, str]:
        """Id -> token."""
        return dict(enumerate([*self.head, *pieces[self.skip :], *self.tail]))

    def special(self, pieces: int, special_pieces: Sequence[int]) -> frozenset[int]:
        """Ids of the class's own tokens and of the special ones of `pieces` pieces."""
        shift = len(self.head) - self.skip
        first = pieces + shift
        return frozenset(
            [
                *range(len(self.head)),
                *(place + shift for place in special_pieces if place >= self.skip),
                *range(first, first + len(self.tail)),
            ]
        )


_MOST_MADE_UP = 100_000


def _count(config: Mapping[str, Any], key: str, usual: int) -> int:
    """A number of tokens that a class makes up; bounded, for a file may state any."""
    value = config.get(key, usual)
    if type(value) is not int or not 0 <= value <= _MOST_MADE_UP:
        raise LexigraftError(
            f"tokenizer_config.json says {key} = {str(value)[:40]}",
            needed=f"a number from 0 to {_MOST_MADE_UP:,}",
            fix="copy tokenizer_config.json again from the model",
        )
    return value


def _t5(config: Mapping[str, Any]) -> Layout:
    last = _count(config, "extra_ids", 100) - 1
    return Layout(tail=tuple(f"<extra_id_{number}>" for number in range(last, -1, -1)))


def _pegasus(config: Mapping[str, Any]) -> Layout:
    unused = (f"<unk_{number}>" for number in range(2, _count(config, "offset", 103)))
    return Layout(("<pad>", "</s>", "<mask_1>", "<mask_2>", *unused), 2)


def _fairseq(*languages: str) -> Callable[[Mapping[str, Any]], Layout]:
    return lambda _config: Layout(_FAIRSEQ, 3, (*languages, "<mask>"))


_LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Layout]] = {
    "T5Tokenizer": _t5,
    "PegasusTokenizer": _pegasus,
    "XLMRobertaTokenizer": _fairseq(),
    "MBartTokenizer": _fairseq(*_MBART),
    "MBart50Tokenizer": _fairseq(*_MBART, *_MBART50),
}


def tokenizer_class(folder: Path) -> str:
    """The class that `tokenizer_config.json` or else `config.json` names, without `Fast`."""
    name = read_settings(folder / "tokenizer_config.json").get("tokenizer_class")
    if not isinstance(name, str):
        model_type = read_settings(folder / "config.json").get("model_type")
        name = _CLASS_OF_MODEL_TYPE.get(model_type, "") if isinstance(model_type, str) else ""
    return name.removesuffix("Fast")


def layout_of(folder: Path) -> Layout:
    """How the tokenizer class of `folder` places the pieces of its `.model`."""
    make = _LAYOUTS.get(tokenizer_class(folder))
    return make(read_settings(folder / "tokenizer_config.json")) if make else Layout()


def ids_are_unreadable(folder: Path) -> bool:
    """True where nothing can be put behind the pieces of a `.model` that stands alone.

    Loaders put the tail of XLM-R and mBART behind whatever pieces there are, and a second time if
    a piece holds its text already; only T5's (`extra_ids`) can be told to leave it out.
    """
    name = tokenizer_class(folder)
    return name in _UNREADABLE or (name != "T5Tokenizer" and bool(layout_of(folder).tail))

"""What `learn` and `check` tell, in Chinese: finished sentences, filled with their figures.

Each is chosen by what a step says of itself (a rule, a kind, a code) and never by reading its
English. What has no sentence here, as in runs of earlier versions, stays in English.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from lexigraft.families.spelling import MAX_CHARACTERS

# selection.sizing.Because.rule -> how the sentence begins.
SIZES: Mapping[str, str] = {
    "asked": "按要求选取 {k:,} 个 token",
    "few": "要求 {asked:,} 个 token，其中出现次数足够的只有 {k:,} 个",
    "all": "选取 {k:,} 个 token：出现次数足够的全部入选",
    "share": "选取 {k:,} 个 token：已达基座 token 数的 {share:.0%}",
    "speed": "选取 {k:,} 个 token：再多会让模型变慢而不是变快",
}

# What stands before the colon in the reason of a selection.terms.TermReport.
TERMS: Mapping[str, str] = {
    "crosses a split of the pre-tokenizer": "跨越预分词器的切口（例如由几个词组成）",
    "is one token already": "本来就是一个 token",
    "too rare": "太少：出现 {occurrences:,} 次，不足 {least:,} 次",
    "contains a digit": "含有数字",
    "contains what is no letter": "含有不是文字的字符",
    f"is more than {MAX_CHARACTERS} characters": f"超过 {MAX_CHARACTERS} 个字符",
    "mixed scripts": "混用多种文字",
    "is banned": "在禁用清单中",
    "the base reads it as one token in running text": "在连续文本中，基座已经把它读作一个 token",
    "dropped": "被舍弃：更强的术语或其他词占用了它的部件，或者需要太多从不单独出现的 token",
    "no room": "名额不足：超出所要求的数量，或者不允许拼接它的部件",
}

# name of a tokenizer family -> what its `limits` say.
LIMITS: Mapping[str, str] = {
    "tiktoken BPE": "rank 文件中 rank 就是编号，新 token 排在特殊 token 之后。"
    "不支持靠数行数来给特殊 token "
    "编号的读取程序（Meta llama-models 的 Tokenizer、transformers 的 TikTokenConverter），"
    "它们会把特殊 token "
    "挪位；按编号识别特殊 token 的程序不受影响（tiktoken、Qwen 的分词器）。",
    "Unigram": "SentencePiece 沿着整段文本以 float32 累加得分：各项性质是在有限长度的片段上证明的；"
    "在远长于此的文本中，无论基座还是扩充后的分词器，两种切分几乎同分时由舍入误差决定。",
    "WordPiece": "该预分词器会把每个汉字单独切开，因此不可能学到新的中文词。",
}

# code of check -> what was found, and what to do; of several, the first that can be filled.
FINDINGS: Mapping[str, Sequence[tuple[str, str]]] = {
    "LG102": [
        (
            "对编号 {id}，{first} 写的是 {text}，{other} 写的是 {named}（加载时先读 {first}）",
            "从同一个模型重新复制这两个文件；能断定哪一个过期时，用 check --fix",
        )
    ],
    "LG103": [
        (
            "{added} 给 {text} 的编号是 {id}，而该文件只有 {tokens:,} 个 token，编号 {lost} "
            "在任何文件中都没有："
            "它比 {added} 旧",
            "从 {added} 的来源目录重新复制该文件",
        )
    ],
    "LG104": [("重复列出了 {file} 中的 {count} 个 token，第一个是编号 {id}", "")],
    "LG105": [
        ("把 {text} 添加为编号 {id}，而 {file} 中没有它", "从同一个目录复制 {file} 和该文件"),
    ],
    "LG106": [
        (
            "有 {count:,} 个不是特殊 token 的附加 token：它们在分词模型之前匹配，也会切进别的词里；"
            "transformers 4.57 以前的读取程序可能要几分钟才能加载",
            "lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
        )
    ],
    "LG107": [
        (
            "added_tokens_decoder 缺少 {file} 中的 {count} 个附加 token，第一个是 {text}（编号 "
            "{id}）："
            "transformers 的 {kind} 会把它们当作普通文本",
            "把其中的 tokenizer_class 改为 PreTrainedTokenizerFast，或用 save_pretrained "
            "重新保存分词器",
        )
    ],
    "LG108": [
        (
            "有 {count:,} 个特殊 token 是普通词，第一个是 {text}：解码时 "
            "skip_special_tokens=True 会把它们丢掉",
            "lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
        )
    ],
    "LG109": [
        (
            "写的是 tokenizer_class = {kind}，而 {file} 是字节级分词器",
            "把其中的 tokenizer_class 改为 PreTrainedTokenizerFast",
        )
    ],
    "LG110": [
        (
            "给 {text} 的编号是 {id}，加载时却会得到 {given}",
            "从原模型重新复制该文件，或用有名字的 token 填上空缺",
        )
    ],
    "LG111": [
        (
            "模板写出的标记中有 {count} 个不是 token，例如 {text}，会被拆开读",
            "从同一个模型复制模板和分词器",
        )
    ],
    "LG112": [
        (
            "把 {text} 指定为 {key}，但分词器文件中没有它：加载时会在 {tokens:,} 个 token "
            "之后新增一个",
            "把其中的 {key} 改为词表中的 token，或执行 lexigraft learn BASE --corpus TEXT "
            "--special LIST -o VOCAB",
        )
    ],
    "LG113": [("模板写出的 {count} 个标记都不是 token，例如 {text}，会被拆开读", "")],
    "LG201": [
        (
            "写的是 {key} = {stated:,}，而权重有 {rows:,} 行：被手工改过，或属于另一份权重",
            "把其中的 {key} 改为 {rows}",
        )
    ],
    "LG202": [
        ("{key} = {id}，但一共只有 {rows:,} 行", "把其中的 {key} 改为分词器的编号"),
    ],
    "LG203": [
        (
            "{key} = {id} 是 {text}，而分词器指定的是 {named}（编号 {wanted}）",
            "把其中的 {key} 改为 {wanted}",
        )
    ],
    "LG302": [
        (
            "有 {rows:,} 行，而分词器有 {tokens:,} 个 token，config.json 写的是 {stated:,}："
            "编号 {rows:,} 到 {last:,} 没有行",
            "对扩充分词器之前的模型执行 lexigraft graft",
        )
    ],
    "LG303": [("在 {tokens:,} 个 token 之外还有 {padding:,} 行：正常的填充行", "")],
    "LG305": [
        (
            "没有输出头，而 tie_word_embeddings 是 false：加载时会用随机数填充",
            "若该模型本来共享权重，把 config.json 中的 tie_word_embeddings 改为 true；"
            "否则重新下载权重",
        )
    ],
    "LG306": [
        (
            "tie_word_embeddings 是 true，却另存了输出头：只有当它与 {embedding} 不同时，"
            "加载才会用到它",
            "",
        )
    ],
    "LG307": [
        (
            "形状是 {shape}（共 {count} 个空张量）：保存时没有收集 ZeRO-3 的分片",
            "在训练目录执行 python zero_to_fp32.py，或保存时打开 "
            "stage3_gather_16bit_weights_on_model_save",
        )
    ],
    "LG308": [
        (
            "没有列出分片中的 {count} 个张量，例如 {tensor}",
            "lexigraft check MODEL --fix MENDED",
        ),
        (
            "写的 total_size 是 {stated}，而张量共 {bytes:,} 字节",
            "lexigraft check MODEL --fix MENDED",
        ),
    ],
    "LG309": [
        ("是一个没有被登记的分片，属于另一次保存", "lexigraft check MODEL --fix MENDED"),
    ],
    "LG502": [
        (
            "分词器的编号表是 {hash}（{tokens:,} 个 token），清单写的是 {wanted}：这些行属于别的词",
            "换回写出该目录时的分词器文件",
        )
    ],
    "LG503": [
        (
            "写的是 {stated:,} 行，而权重有 {rows:,} 行",
            "从同一个目录复制权重和清单",
        )
    ],
    "LG504": [
        (
            "写出时的清单是 {hash}，不是 {manifest} 的任何一个早先状态",
            "从同一个目录复制分词器文件和清单",
        )
    ],
}

# Cells of the table of `check` that are words.
CELLS: Mapping[str, str] = {
    "tokens": "token",
    "rows": "行",
    "tied": "与嵌入共享",
    "output head": "输出头",
    "trained rows": "训练过的行",
    "stored row by row": "逐行保存",
    "chat template": "对话模板",
}


def size_sentence(because: Mapping[str, Any]) -> str:
    """Why there are so many new tokens, of the plain data of a `Because`."""
    told = SIZES[because["rule"]].format_map(because)
    told += "；文本长度为原来的 {ratio:.3f}，曲线在 {knee:,} 处弯折".format_map(because)
    if because["more"]:
        told += "，再加 {more:,} 个还能省 {further:.1%}".format_map(because)
    return told


def term_reason(row: Mapping[str, Any], least: int) -> str:
    """Why a listed term is no new token; `least` occurrences were asked for."""
    reason: str = row["reason"]
    sentence = TERMS.get(reason.partition(":")[0])
    return reason if sentence is None else sentence.format_map({**row, "least": least})


def finding_sentence(finding: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a finding of `check` found and what to do; None where that is told in English alone."""
    values = finding.get("values") or {}
    for found, fix in FINDINGS.get(finding["code"], ()):
        if fields(found) | fields(fix) <= values.keys():
            return found.format_map(values), fix.format_map(values)
    return None


def fields(sentence: str) -> set[str]:
    """The names that a sentence is filled by."""
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}

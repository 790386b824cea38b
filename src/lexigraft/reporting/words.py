"""The words of the page, in English and in Chinese, and the verdict of a training in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lexigraft.models.verdict import HARMFUL, UNKNOWN, Thresholds, fall_per_doubling, starved

Language = Literal["en", "zh"]
Words = Callable[..., str]  # t(key, **values)

# key -> (English, Chinese). Braces are filled by name.
WORDS: Mapping[str, tuple[str, str]] = {
    "title": ("{base}, extended", "{base} 扩充词表"),
    "skip": ("Skip to the content", "跳到正文"),
    "theme": ("Light or dark", "切换深浅色"),
    "contents": ("Contents", "目录"),
    "unfinished": (
        "This run is not finished: what it has not done yet is missing below. Run the recipe again "
        "and it goes on where it stopped.",
        "本次运行尚未完成，缺少的部分在下文注明。再次运行同一份 recipe 即可从中断处继续。",
    ),
    "lede": (
        "{added} new tokens; text of the field takes {share} fewer tokens, general text reads as "
        "before.",
        "新增 {added} 个 token；领域文本所需 token 减少 {share}，通用文本的切分保持不变。",
    ),
    "lede.replaced": (
        "{added} new tokens, {replaced} of them under the ids of old ones; text of the field takes "
        "{share} fewer tokens, text without those old ones reads as before.",
        "新增 {added} 个 token，其中 {replaced} 个使用旧 token 让出的编号；领域文本所需 token 减少 "
        "{share}，不含这些旧 token 的文本切分保持不变。",
    ),
    "lede.special": (
        " {special} new special tokens stand behind them.",
        "另有 {special} 个新的特殊 token。",
    ),
    # headline numbers
    "card.added": ("new tokens", "新增 token"),
    "card.added.note": ("{before} → {after} in all", "词表 {before} → {after}"),
    "card.added.replaced": (
        "{before} → {after} in all, {replaced} under old ids",
        "词表 {before} → {after}，{replaced} 个沿用旧编号",
    ),
    "card.tokens": ("tokens of domain text", "领域文本 token 数"),
    "card.tokens.note": ("{before} → {after} per byte", "每字节 {before} → {after}"),
    "card.domain": ("domain bits per byte", "领域文本 比特/字节"),
    "card.domain.control": ("control on the same text: {value}", "同文本对照组：{value}"),
    "card.domain.base": ("base: {value}", "基座：{value}"),
    "card.general": ("general bits per byte", "通用文本 比特/字节"),
    "card.general.note": ("base: {value}", "基座：{value}"),
    "card.speed": ("writing speed", "生成速度"),
    "card.speed.note": (
        "{fast} against {slow} characters/s (control)",
        "{fast} 字符/秒，对照组 {slow}",
    ),
    "card.verdict": ("was the training enough?", "训练够了吗？"),
    "card.verdict.note": (
        "{reasons} to do, {unknown} unknown",
        "待处理 {reasons} 项，未测 {unknown} 项",
    ),
    "sufficient": ("sufficient", "足够"),
    "not yet": ("not yet", "尚不足"),
    "harmful": ("harmful", "有害"),
    # sections
    "sentences": ("Before and after", "扩充前后"),
    "sentences.lede": (
        "The first held-out sentences that hold a new token. New tokens are coloured: point at "
        "one, or reach it with the Tab key, to see what it replaces and how often it occurs.",
        "留出文本中最先出现新 token 的几个句子。着色的是新 token：把指针移上去，或用 Tab 键选中，"
        "即可看到它取代了哪些片段、出现了多少次。",
    ),
    "sentences.samples": ("Samples of the recipe", "recipe 指定的例句"),
    "unseen": ("Not shown: {why}.", "无法显示：{why}。"),
    "sentences.no_text": (
        "the held-out text has none with a new token",
        "留出文本中没有含新 token 的句子",
    ),
    "base": ("base", "基座"),
    "extended": ("extended", "扩充后"),
    "tokens": ("tokens", "个 token"),
    "tip.pieces": ("base: {pieces} ({n} tokens)", "基座切分：{pieces}（{n} 个 token）"),
    "tip.count": ("{n} times in the learning text", "在学习文本中出现 {n} 次"),
    "tip.id": ("id {id}", "编号 {id}"),
    "size": ("How many tokens", "选取多少个 token"),
    "size.lede": (
        "Each new token shortens the text of the field a little less than the one before. The "
        "curve counts base tokens that are left per byte.",
        "每多学一个 token，领域文本都会再短一些，但收益递减。曲线为每字节文本所需的 token 数。",
    ),
    "size.x": ("new tokens", "新增 token 数"),
    "size.y": ("tokens per byte", "token/字节"),
    "size.knee": ("knee {k}", "拐点 {k}"),
    "size.fastest": ("fastest {k}", "最快 {k}"),
    "size.chosen": ("chosen {k}", "选定 {k}"),
    "size.alt": (
        "From {y0} tokens per byte without new tokens to {y1} with {k}; the curve bends at {knee}.",
        "不加新 token 时每字节 {y0} 个 token，加到 {k} 个后为 {y1}；拐点在 {knee}。",
    ),
    "size.speed": (
        "speed on domain text, as a multiple of the base's (estimated)",
        "领域文本速度，基座的倍数（估计）",
    ),
    "size.median": (
        "occurrences of a new token in training, median (expected)",
        "训练中每个新 token 的出现次数，中位数（预期）",
    ),
    "size.low": (
        "nine new tokens in ten occur at least so often (expected)",
        "九成新 token 至少出现的次数（预期）",
    ),
    "table": ("All new tokens", "全部新 token"),
    "table.search": (
        "Search: text, bytes, id, origin, verdict",
        "搜索：文本、字节、编号、来源、结论",
    ),
    "table.found": (
        "{shown} of {found} shown, {all} in all",
        "匹配 {found} 个，显示 {shown} 个，共 {all} 个",
    ),
    "table.more": ("Show more", "显示更多"),
    "table.caption": (
        "The heads of columns sort. Seen: how often training predicted the token. Moved: how far "
        "its row is from where it started. Likeliest: where it should come next, how often it is "
        "the model's first choice. Bits: what it costs the model there, before training and after.",
        "点击表头可排序。“训练次数”指训练中预测到该 token 的次数；“位移”指其行向量离起点的距离；"
        "“首选率”指该出现它的地方，模型把它作为首选的比例；"
        "“比特”指模型在那里预测它的代价，训练前后各一列。",
    ),
    "table.script": (
        "Without scripts only the first tokens are listed; report.json holds all.",
        "未启用脚本，这里只列出前面的 token；完整列表见 report.json。",
    ),
    "col.id": ("id", "编号"),
    "col.token": ("token", "token"),
    "col.pieces": ("pieces in the base", "基座切分"),
    "col.count": ("count", "次数"),
    "col.saved": ("tokens saved", "节省 token"),
    "col.specificity": ("specificity", "领域特异性"),
    "col.origin": ("origin", "来源"),
    "col.targets": ("seen", "训练次数"),
    "col.moved": ("moved", "位移"),
    "col.top1": ("likeliest", "首选率"),
    "col.bits_before": ("bits before", "训练前比特"),
    "col.bits": ("bits after", "训练后比特"),
    "col.verdict": ("verdict", "结论"),
    "merge": ("text", "文本"),
    "term": ("list", "清单"),
    "character": ("character", "单字"),
    "bridge": ("only a part", "仅作部件"),
    "special": ("special", "特殊"),
    "learned": ("learned", "已学会"),
    "rare": ("too rare", "出现太少"),
    "spelled": ("still spelled out", "仍拆开写"),
    "unmoved": ("not moved", "未更新"),
    "terms": ("Listed terms", "清单中的术语"),
    "terms.lede": (
        "{listed} listed; {became} became tokens, which cover {share} of their {occurrences} "
        "occurrences. Shown are those that occur most.",
        "清单共 {listed} 条，其中 {became} 条成为 token，覆盖其 {occurrences} 次出现中的 {share}。"
        "下表为出现最多的术语。",
    ),
    "terms.term": ("term", "术语"),
    "terms.occurrences": ("occurrences", "出现次数"),
    "terms.token": ("token", "token 编号"),
    "terms.became": ("what became of it", "处理结果"),
    "terms.reached": ("{n} reached", "命中 {n} 次"),
    "training": ("Training", "训练"),
    "training.domain": ("Text of the field", "领域文本"),
    "training.general": ("General text", "通用文本"),
    "training.x": ("bytes trained on", "训练文本字节数"),
    "training.y": ("bits per byte", "比特/字节"),
    "training.alt": (
        "{name}: from {start} to {end} bits per byte.",
        "{name}：每字节 {start} → {end} 比特。",
    ),
    "training.base": ("base, untrained: {value}", "基座（未训练）：{value}"),
    "training.note": (
        "Bits per byte are comparable across tokenizers; lower is better. The controls are the "
        "base without new tokens, trained in the same way: once on the same text, once with about "
        "as much computing. Figures above and lines are measured by training, the table of models "
        "afterwards, as a rule on more text: they differ.",
        "“比特/字节”可在不同分词器之间比较，越低越好。对照组是不加新 token 的基座，以同样方式训练："
        "一组用同样的文本，一组用大致相同的算力。上表和曲线由训练步骤测得，"
        "模型对比表在训练之后测得，所用文本通常更多，因此数值不同。",
    ),
    "bits.base": ("base, untrained", "基座（未训练）"),
    "bits.before": ("before training", "训练前"),
    "bits.after": ("after training", "训练后"),
    "training.log": ("All measurements", "全部测量值"),
    "log.bytes": ("trained on bytes", "训练字节数"),
    "log.old": ("of old tokens", "旧 token 部分"),
    "log.new": ("of new tokens", "新 token 部分"),
    "log.leak": ("leak", "泄漏"),
    "colon": (": ", "："),
    "needed": ("needed: {text}", "要求：{text}"),
    "next": ("next: {text}", "建议：{text}"),
    "unknown": ("unknown: {text}", "未测：{text}"),
    "sufficient.says": ("no rule is broken", "所有标准都已满足"),
    "not yet.says": ("what is missing, and what to do", "还缺什么、该怎么做"),
    "harmful.says": ("the model has become worse", "模型变差了"),
    "models": ("The models side by side", "模型对比"),
    "model": ("model", "模型"),
    "grafted": ("grafted, untrained", "嫁接后（未训练）"),
    "merged": ("extended, trained", "扩充并训练"),
    "control, equal text": ("control, same text", "对照组（同文本）"),
    "control, equal compute": ("control, same computing", "对照组（同算力）"),
    "models.tokens": ("tokens/byte", "token/字节"),
    "models.domain": ("domain bpb", "领域 bpb"),
    "models.general": ("general bpb", "通用 bpb"),
    "models.speed": ("characters/s", "字符/秒"),
    "models.bytes": ("trained on bytes", "训练字节"),
    "models.trained": ("trained tokens", "训练 token"),
    "models.seconds": ("seconds", "秒"),
    "rows": ("The new rows", "新增的行向量"),
    "rows.lengths": ("Lengths of rows: {name}", "行向量长度：{name}"),
    "rows.map": ("New rows among old ones", "新旧行向量分布图"),
    "rows.x": ("length", "长度"),
    "rows.y": ("share of rows", "占比"),
    "rows.pc": ("component {n} ({share} of the variance)", "主成分 {n}（方差占比 {share}）"),
    "rows.lengths.alt": (
        "Most new rows are about {new} long, most old ones about {old}.",
        "新行长度多在 {new} 左右，旧行多在 {old} 左右。",
    ),
    "rows.map.alt": (
        "{new} new and {old} old rows along their two main directions.",
        "{new} 个新行与 {old} 个旧行在两个主方向上的位置。",
    ),
    "rows.note": (
        "Rows of the model in {folder}/, a sample where there are many. New rows that lie apart "
        "from all old ones, or are much longer or shorter, have not found their place.",
        "取自 {folder}/ 中的模型，数量多时为抽样。"
        "若新行远离所有旧行，或明显过长、过短，说明还没有训练到位。",
    ),
    "rows.new": ("new", "新"),
    "rows.old": ("old", "旧"),
    "proofs": ("What was proved", "已验证的性质"),
    "proof.replaced": (
        "{n} old tokens gave their ids and rows away; the next lines compare with the base without "
        "them.",
        "{n} 个旧 token 让出了编号和行向量；以下各项与去掉它们的基座对比。",
    ),
    "proof.replaced.domain": (
        " That alone splits {changed} of {texts} domain texts otherwise.",
        "仅此一项，{texts} 段领域文本中有 {changed} 段的切分改变。",
    ),
    "proof.replaced.general": (
        " That alone splits {changed} of {texts} general texts otherwise.",
        "仅此一项，{texts} 段通用文本中有 {changed} 段的切分改变。",
    ),
    "proof.drift": (
        "No drift: {n} texts without a new token are split otherwise than by the base.",
        "无漂移：不含新 token 的文本中，切分与基座不同的有 {n} 段。",
    ),
    "proof.reach": (
        "Reachable: {dead} of {added} new tokens never come out of the learning text, {bridges} "
        "of them parts of others.",
        "可达：{added} 个新 token 中有 {dead} 个在学习文本里从不单独出现，"
        "其中 {bridges} 个是其他 token 的部件。",
    ),
    "proof.parity": (
        "Parity: {engines} read {texts} texts alike; old ids kept, texts only coarsened, decoded "
        "as before.",
        "一致：{engines} 对 {texts} 段文本的结果相同；旧编号不变，切分只会变粗，解码结果不变。",
    ),
    "proof.base_differences": (
        "The base's own files differ on {n} of these texts; each keeps its own reading.",
        "基座自己的文件在其中 {n} 段上就不一致，各自保持原样。",
    ),
    "proof.loader": (
        "transformers' own loader reads {n} texts as the extended files do.",
        "transformers 自带的加载器对 {n} 段文本的结果与扩充后的文件一致。",
    ),
    "proof.no_loader": (
        "Not compared with transformers: {why}.",
        "未与 transformers 对比：{why}。",
    ),
    "proof.equal": (
        "{tensor}: {equal_new} new rows equal another new one, {equal_old} an old one.",
        "{tensor}：{equal_new} 个新行与其他新行相同，{equal_old} 个与旧行相同。",
    ),
    "proof.moved": (
        "{moved} of {rows} new rows moved in training.",
        "训练中 {rows} 个新行有 {moved} 个发生了更新。",
    ),
    "proof.check": ("The merged model passes the check.", "合并后的模型通过检查。"),
    "proof.no_check": (
        "The merged model has faults, listed below.",
        "合并后的模型存在问题，见下表。",
    ),
    "check": ("Check of the merged model", "合并后模型的检查"),
    "check.part": ("part", "部分"),
    "check.counts": ("counts", "计数对象"),
    "check.count": ("count", "数量"),
    "check.detail": ("detail", "说明"),
    "error": ("error", "错误"),
    "warning": ("warning", "警告"),
    "note": ("note", "提示"),
    "lineage": ("Where it comes from", "来源记录"),
    "lineage.lede": (
        "The manifest of {folder}/, oldest step first. Hashes cover content; equal inputs give "
        "equal hashes.",
        "{folder}/ 中的清单文件，按步骤先后排列。哈希按内容计算，输入相同则哈希相同。",
    ),
    "lineage.settings": ("settings", "设置"),
    "lineage.hash": ("manifest", "清单哈希"),
    "repeat": ("Do it again", "复现"),
    "repeat.lede": (
        "Save the recipe, then run it. The single commands below do the same without controls.",
        "保存下面的 recipe 并运行即可。其后的单条命令效果相同，但不训练对照组。",
    ),
    "repeat.recipe": ("recipe.yaml", "recipe.yaml"),
    "repeat.steps": ("Step by step", "逐步执行"),
    "repeat.versions": ("Versions", "版本"),
    "repeat.times": ("Time", "用时"),
    "seconds": ("seconds", "秒"),
    "all": ("all", "合计"),
    "missing": (
        "Not there yet: this run has not done {stages}.",
        "暂无：本次运行尚未完成 {stages}。",
    ),
    "footer": ("Written by lexigraft {version}.", "由 lexigraft {version} 生成。"),
    # the box of `serve`
    "try": ("Try it", "试一试"),
    "try.label": ("Text", "文本"),
    "try.hint": (
        "Type, and see both readings. Nothing leaves this machine.",
        "输入文字，即可看到两种切分。内容不会离开本机。",
    ),
    "try.write": ("Let both models write on", "让两个模型续写"),
    "try.working": ("The models are writing …", "模型正在续写……"),
}


def speaker(language: Language) -> Words:
    """The words for each key in a language."""
    place = 0 if language == "en" else 1

    def t(key: str, **values: Any) -> str:
        return WORDS[key][place].format(**values)

    return t


def reasons(facts: Mapping[str, Any], language: Language) -> list[dict[str, str]]:
    """Why a training is not enough: `found`, `needed`, `next` of each broken rule."""
    broken: Sequence[Mapping[str, str]] = facts["training"]["verdict"]["reasons"]
    keys = ("found", "needed", "next")
    if language == "en":
        return [{key: reason[key] for key in keys} for reason in broken]
    return [dict(zip(keys, _in_chinese(reason, facts), strict=True)) for reason in broken]


def _in_chinese(reason: Mapping[str, str], facts: Mapping[str, Any]) -> tuple[str, str, str]:
    """A rule of `models.verdict` in Chinese, with the figures that it speaks of."""
    training, tokens = facts["training"], facts["tokens"]
    limits = training["verdict"]["thresholds"]
    log, base = training["log"], training["base"]
    end, start = log[-1], log[0]
    rule = reason["rule"]
    if rule == "occurrences":
        return _few(tokens, limits, end["text_bytes"])
    if rule == "moved":
        still = [token["shown"] for token in tokens if token["moved"] == 0]
        return (
            f"{len(still):,} 个新行没有更新",
            "每个新行都应更新",
            f"删去这些 token，或补充含有它们的文本：{_some(still, limits)}",
        )
    if rule == "falling":
        return (
            f"领域文本的比特数仍在下降，文本每翻一倍降 {fall_per_doubling(log) or 0:.1%}",
            f"不超过 {limits['falling']:.0%}",
            "继续用更多文本训练（--max-bytes），仍有收益",
        )
    if rule == "adoption":
        return (
            f"模型写出新 token 的文字时，只有 {training['adoption']:.0%} 用了该 token，"
            "其余仍用旧的拼法",
            f"{limits['adoption']:.0%}",
            "延长训练，或补充含有这些 token 的文本",
        )
    return _worse(reason, end, start, base, limits)


def _worse(
    reason: Mapping[str, str],
    end: Mapping[str, float],
    start: Mapping[str, float],
    base: Mapping[str, float | None],
    limits: Mapping[str, float],
) -> tuple[str, str, str]:
    """The rules that compare bits per byte with those before training, or with the base's."""
    if reason["rule"] == "general":
        known = base.get("general_bpb")
        before, name = (known, "基座") if known is not None else (start["general_bpb"], "训练前")
        return (
            f"通用文本每字节 {end['general_bpb']:.3f} 比特，比{name}（{before:.3f}）"
            f"多 {end['general_bpb'] / before - 1:.1%}",
            f"最多多 {limits['general']:.0%}",
            "提高 --replay（加入更多 --general 文本），或降低 --learning-rate",
        )
    if reason["verdict"] == HARMFUL:
        return (
            f"领域文本每字节 {end['domain_bpb']:.3f} 比特，训练前为 {start['domain_bpb']:.3f}",
            "低于训练前",
            "降低 --learning-rate 和 --new-row-learning-rate",
        )
    return (
        f"领域文本每字节 {end['domain_bpb']:.3f} 比特，基座为 {base['domain_bpb']:.3f}",
        "不高于基座",
        "用更多文本训练（--max-bytes），或少学一些 token（lexigraft learn --tokens）",
    )


def _few(
    tokens: Sequence[Mapping[str, Any]], limits: Mapping[str, Any], size: int
) -> tuple[str, str, str]:
    """New tokens that were too rarely a target: below the floor, else below the support."""
    known = [token for token in tokens if token["targets"] is not None]
    found = starved(
        [token["targets"] for token in known],
        [token.get("within") or 0 for token in known],
        size,
        Thresholds(**limits),
    )
    assert found is not None  # the verdict has found it
    few = sorted((known[place] for place in found.places), key=lambda token: token["targets"])
    apart = "" if found.rows == len(known) else "（不计更长 token 的组成部分）"
    return (
        f"{found.rows:,} 个新 token{apart}中有 {len(few):,} 个在训练中被预测不足 {found.least} 次",
        f"除 {found.share:.0%} 以外都达到 {found.least} 次",
        f"用更多含有{_some([token['shown'] for token in few], limits)}的文本训练，"
        f"或只学这么多文本教得会的词（lexigraft learn --train-bytes {found.supported}）",
    )


def _some(names: Sequence[str], limits: Mapping[str, Any]) -> str:
    # Each name is isolated, so that one written from right to left leaves the sentence as it is.
    shown = "、".join(f"“\u2068{name}\u2069”" for name in names[: limits["weakest"]])
    rest = len(names) - limits["weakest"]
    return f"{shown} 等 {len(names):,} 个" if rest > 0 else shown


# What a verdict may call unknown.
_UNKNOWN = {
    "domain": "领域文本的比特/字节（请用 --held-out 给出文本）",
    "base": "基座的比特/字节（请用 --base 指定）",
    "general": "通用文本是否变差（请用 --general 给出文本，不能太短）",
    "falling": "更多文本是否有用（请增加测量次数 --measurements）",
    "adoption": "新 token 是否被采用：模型写出其文字的地方不足 {decided} 处",
    "parts": "作为更长新 token 一部分的 token 单独出现时读得如何：其中有的被预测不足 {floor} 次，"
    "同类文本再多，它们也多半在更长的 token 里",
}


def unknown(facts: Mapping[str, Any], language: Language) -> list[str]:
    """What a verdict could not judge."""
    found: list[str] = facts["training"]["verdict"]["unknown"]
    if language == "en":
        return found
    limits = facts["training"]["verdict"]["thresholds"]
    told = {UNKNOWN[key].format(**limits): _UNKNOWN[key].format(**limits) for key in UNKNOWN}
    return [told.get(text, text) for text in found]

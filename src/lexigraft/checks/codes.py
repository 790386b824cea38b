"""Every code of `check`, with its story: one table for findings, `--explain` and docs/check.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lexigraft.errors import LexigraftError

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Code:
    """What a code stands for.

    Attributes:
        severity: `error` makes a check fail; `warning` and `note` do not.
        meaning: what is wrong, in one clause.
        cause: how it usually comes about, and what follows from it.
        example: such a case, with numbers.
        mend: the command or action that mends it; nothing to mend for most notes.
        source: of a rule of another program, where it stands in that program.
    """

    severity: Severity
    meaning: str
    cause: str
    example: str
    mend: str
    source: str = ""


# Codes are stable: scripts may rely on them.
CODES: dict[str, Code] = {
    "LG101": Code(
        "error",
        "a tokenizer file cannot be read",
        "A download was cut off, git fetched a Git LFS pointer instead of the file, or the file "
        "was edited by hand. No id can be told from it.",
        "tokenizer.model has 130 bytes that begin with `version https://git-lfs`.",
        "hf download NAME --local-dir MODEL",
    ),
    "LG102": Code(
        "error",
        "two tokenizer files give an id different texts, or one lacks tokens",
        "One file was extended or replaced and the other was left as it was. Which of them counts "
        "depends on the loader: transformers reads tokenizer.json first, llama.cpp's converter "
        "tokenizer.model, so one model reads a text in two ways.",
        "tokenizer.model has 33,296 pieces, the old tokenizer.json beside it 32,000: for id 32,000 "
        "one says `▁angina`, the other nothing.",
        "mv MODEL/tokenizer.json MODEL/tokenizer.json.stale",
    ),
    "LG103": Code(
        "error",
        "added tokens leave a hole after the vocabulary",
        "added_tokens.json was written when the vocabulary was longer than the model file that "
        "lies beside it now. Slow loaders stop with `Non-consecutive added token`, others give "
        "these tokens new ids.",
        "added_tokens.json gives `<human>` the id 480, tokenizer.model ends at 359.",
        "cp SOURCE/tokenizer.model MODEL/ (SOURCE: where added_tokens.json came from)",
    ),
    "LG104": Code(
        "note",
        "added_tokens.json repeats tokens of the vocabulary",
        "Older versions of transformers wrote the base's special tokens into it. Loaders take no "
        "harm; old converters to GGUF did.",
        'added_tokens.json holds {"<unk>": 0, "<s>": 1, "</s>": 2}.',
        "nothing to mend",
    ),
    "LG105": Code(
        "warning",
        "an added token is in tokenizer_config.json only",
        "Two runs of a trainer wrote one file each. Loaders that read tokenizer.json alone do not "
        "know the token, and split it.",
        "tokenizer_config.json adds `<|call|>` as id 151,669, tokenizer.json ends at 151,668.",
        "copy tokenizer.json and tokenizer_config.json from one folder",
    ),
    "LG106": Code(
        "note",
        "words are added tokens instead of tokens of the model",
        "`add_tokens` was called with a list of words. Added tokens are matched before the "
        "tokenizer's model reads a text, also inside other words (`cat` in `concatenate`), and "
        "old readers take minutes to load thousands of them.",
        "5,000 added tokens that are not special.",
        "lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
    ),
    "LG107": Code(
        "warning",
        "added_tokens_decoder lacks added tokens of tokenizer.json",
        "A tool edited tokenizer.json alone. transformers 5 builds the tokenizers of Qwen2 and "
        "GPT-2 kinds from vocabulary and merges, adds what tokenizer_config.json lists, and reads "
        "every other added token as plain text.",
        "tokenizer.json has `<|diagnosis|>` as id 151,669, added_tokens_decoder ends at 151,668.",
        "set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json",
    ),
    "LG108": Code(
        "warning",
        "words are flagged special",
        "Words were added with `add_special_tokens`. `skip_special_tokens=True`, which every chat "
        "program sets, leaves them out of what it shows.",
        "`angina` is a special token: `acute angina` is decoded as `acute`.",
        "lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
    ),
    "LG109": Code(
        "note",
        "a byte-level tokenizer is declared as Llama's",
        "The class was copied from another model. Some versions of transformers 5 build a "
        "SentencePiece tokenizer from it and garble every text "
        "(huggingface/transformers#46686); later ones tell, and read tokenizer.json.",
        "tokenizer_class is LlamaTokenizerFast, tokenizer.json has a ByteLevel pre-tokenizer.",
        "set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json",
    ),
    "LG110": Code(
        "error",
        "loaders will give an added token another id than the file",
        "tokenizer.json was written by hand, or by a tool that leaves holes. Loaders number added "
        "tokens one after another behind the vocabulary, without a word, so that the token gets "
        "the row of another.",
        "`<|call|>` has the id 400 in the file, the vocabulary 360 tokens: it is loaded as 360.",
        "copy tokenizer.json again from the model, or fill the hole with named tokens",
    ),
    "LG111": Code(
        "warning",
        "the chat template writes some markers that are no tokens",
        "The template is of another model, or of another version of this one. Such a marker is "
        "read in pieces that the model was not trained on.",
        "the template writes `<|im_start|>` and `<|im_end|>`, only the latter is a token.",
        "copy the template and the tokenizer from one model",
    ),
    "LG112": Code(
        "error",
        "a special token is named that the tokenizer does not have",
        "A trainer or a template set eos or pad in tokenizer_config.json alone. Loaders add the "
        "token at the end, where the model may have no row.",
        "pad_token is `[PAD]`, no file has it: it is loaded as id 32,000, there are 32,000 rows.",
        "set it to a token of the vocabulary, or lexigraft learn BASE --corpus TEXT --special LIST "
        "-o VOCAB",
    ),
    "LG113": Code(
        "note",
        "the chat template writes markers of which none is a token",
        "Some models are trained so (Zephyr), and all is well. Else the template is of another "
        "model.",
        "the template writes `<|user|>`, which is read as `<`, `|`, `user`, `|`, `>`.",
        "nothing to mend, if the model was trained with this template",
    ),
    "LG114": Code(
        "warning",
        "the tokenizer takes long to load",
        "Words were entered as added tokens by the thousand, which some versions of transformers "
        "read one by one, or there is no tokenizer.json, so that it is made anew each time. "
        "`--deep` alone sees it: such a tokenizer is loaded by the installed transformers, and "
        "the time is taken.",
        "chinese-llama-2 without tokenizer.json: half an hour (huggingface/transformers#26375).",
        "lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
    ),
    "LG115": Code(
        "note",
        "new tokens come out of no text",
        "A word was added without the parts that the tokenizer joins it of, or with a score that "
        "never wins: it is written in pieces as before, and its row is never used or trained. "
        "`--deep` alone sees it, and needs `--base` or a manifest to know what is new.",
        "`▁angiocardiogram` is in the vocabulary, and no merge makes it.",
        "lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
    ),
    "LG116": Code(
        "warning",
        "files of the tokenizer read texts differently, which the base's read alike",
        "tokenizer.json joins by its merges, tokenizer.model by its scores: a tool gave new tokens "
        "an order in one and another in the other (all scores 0). What a model reads hangs on the "
        "loader. `--deep` alone sees it, and needs `--base`.",
        "`angina` is [371] by tokenizer.json and [285, 301] by tokenizer.model.",
        "lexigraft learn BASE --corpus TEXT --terms WORDS -o VOCAB",
    ),
    "LG201": Code(
        "error",
        "config.json does not state the number of rows that the weights have",
        "vocab_size was raised by hand, or is of another model; or an exporter wrote the base's "
        "number. Loaders build tables of the stated size and stop at the weights.",
        "config.json says vocab_size = 63,872, embed_tokens has 32,000 rows.",
        "set vocab_size in config.json to the number of rows",
    ),
    "LG202": Code(
        "error",
        "an id that a config names has no row",
        "eos, pad or a list such as suppress_tokens was taken from another tokenizer. Generation "
        "ends in an index error, on a GPU in `device-side assert`.",
        "generation_config.json says pad_token_id = 32,000, there are 32,000 rows (0 to 31,999).",
        "set that key to the tokenizer's id",
    ),
    "LG203": Code(
        "warning",
        "a special id of a config is another token than the tokenizer's",
        "A chat template or a merge changed the tokenizer's eos or pad and not the config. A model "
        "whose eos is stale never stops.",
        "eos_token_id = 2 is `</s>`, the tokenizer's eos_token is `<|im_end|>` (id 32,001).",
        "set that key to the tokenizer's id",
    ),
    "LG204": Code(
        "error",
        "a config cannot be read",
        "A cut download or an edit by hand.",
        "generation_config.json ends in the middle of a line.",
        "hf download NAME --local-dir MODEL",
    ),
    "LG301": Code(
        "error",
        "the weights cannot be read",
        "A shard is missing, cut off, or named by an index that belongs to other shards; two "
        "shards hold the same tensor; or the weights are a pickle, which is never opened.",
        "the index names model-00002-of-00002.safetensors, which is not there.",
        "hf download NAME --local-dir MODEL",
    ),
    "LG302": Code(
        "error",
        "fewer rows than tokens",
        "The tokenizer was extended and the model was not. The first new token ends in an index "
        "error, on a GPU in `device-side assert triggered`.",
        "embed_tokens has 32,000 rows, the tokenizer 33,296 tokens.",
        "lexigraft graft BASE VOCAB -o MODEL",
    ),
    "LG303": Code(
        "note",
        "more rows than tokens: padding",
        "Tables are padded to a multiple of 64 or 128 for speed. That is as it should be, and "
        "nothing may cut them off.",
        "Qwen3 has 151,936 rows and 151,669 tokens.",
        "nothing to mend",
    ),
    "LG304": Code(
        "error",
        "vocabulary tensors have different numbers of rows, or cannot be told",
        "Embedding and head were resized by different code, or the weights were saved half-way; or "
        "the layout is not known and has to be named.",
        "embed_tokens has 32,016 rows, lm_head 32,000.",
        "train and save it with one tokenizer; of an unknown layout, lexigraft graft ... --tensor "
        "NAME=embed, which records what it was told",
    ),
    "LG305": Code(
        "error",
        "untied by the config, but no output head is stored",
        "A tied model was saved with tie_word_embeddings = false, or its head was lost. Loaders "
        "fill the head with noise and only warn.",
        "tie_word_embeddings is false, no tensor is called lm_head.weight.",
        "set tie_word_embeddings to true in config.json, if this model ties them",
    ),
    "LG306": Code(
        "note",
        "tied by the config, but an output head is stored",
        "Harmless where both hold the same. Where they differ, one of them is lost on loading, "
        "and which depends on the loader: `--deep` compares them (LG705).",
        "tie_word_embeddings is true, and lm_head.weight is in the file.",
        "lexigraft check MODEL --deep",
    ),
    "LG307": Code(
        "error",
        "a tensor of the weights is empty",
        "DeepSpeed ZeRO-3 cuts every tensor into one part per rank; the model was saved without "
        "gathering them.",
        "embed_tokens has shape [0].",
        "python zero_to_fp32.py CHECKPOINT OUT, in the training folder",
    ),
    "LG308": Code(
        "warning",
        "the index disagrees with its shards",
        "A tool replaced a shard and not the index, or the other way round. Loaders that read the "
        "index alone miss tensors, or reserve memory for too few.",
        "total_size is 13,476,839,424, the tensors have 13,487,463,424 bytes.",
        'write the index again: python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('MODEL').save_pretrained('NEW')\"",
    ),
    "LG309": Code(
        "warning",
        "a shard lies in the folder that the index does not name",
        "An earlier save was cut into more files. Programs that read every file of a folder take "
        "its old tensors.",
        "model-00003-of-00003.safetensors lies beside the index of two shards.",
        "rm MODEL/model-00003-of-00003.safetensors",
    ),
    "LG310": Code(
        "note",
        "a kind of model to which no row can be added, so that its rows are not compared",
        "Other ids follow its text tokens (Gemma 3n, Whisper), or it is made of two models, or its "
        "tables stand on their side. The model may be sound; graft and merge refuse it.",
        "is a gemma3n model: its image and audio tokens follow the text tokens.",
        "nothing to mend; to extend a vocabulary, choose another base model",
    ),
    "LG401": Code(
        "error",
        "the adapter has more rows than the model",
        "Tokens were added before the adapter was trained, and the adapter is used on the base as "
        "it was. PEFT says `size mismatch ... torch.Size([33296, 4096]) from checkpoint, the shape "
        "in current model is torch.Size([32000, 4096])`.",
        "the adapter has 33,296 rows, the model 32,000.",
        "lexigraft merge BASE ADAPTER -o MERGED",
    ),
    "LG402": Code(
        "warning",
        "the adapter has fewer rows than the model",
        "The trainer resized the model to the length of its tokenizer and cut padding rows off, or "
        "the model was extended after the training. PEFT stops with a size mismatch.",
        "the adapter has 151,666 rows, the model 151,936.",
        "lexigraft merge MODEL ADAPTER -o MERGED",
    ),
    "LG403": Code(
        "error",
        "a tensor of the adapter is empty",
        "It was saved from one rank of DeepSpeed ZeRO-3 without gathering the others.",
        "lora_A of embed_tokens has shape [0].",
        "python zero_to_fp32.py CHECKPOINT OUT, or save with "
        "stage3_gather_16bit_weights_on_model_save",
    ),
    "LG404": Code(
        "error",
        "the adapter's tokenizer is no extension of the model's",
        "Model and adapter were extended by different lists of tokens, or a tokenizer was copied "
        "into the wrong folder. Sizes may agree; the rows belong to other words all the same.",
        "id 32,000 is `▁angina` in the adapter and `▁tensor` in the model.",
        "lexigraft check OTHER --adapter ADAPTER (OTHER: the model it was trained on)",
    ),
    "LG405": Code(
        "error",
        "the adapter's new rows belong to unknown tokens",
        "The training script saved no tokenizer beside the adapter. Its rows can be counted, but "
        "not read.",
        "the adapter has 33,296 rows, the model 32,000, and no tokenizer file lies beside it.",
        "lexigraft merge BASE ADAPTER --tokenizer TOKENIZER -o MERGED",
    ),
    "LG406": Code(
        "warning",
        "the adapter was trained on more tokens than the model's tokenizer has",
        "The new tokens took padding rows of the base, so that sizes agree. With the base's "
        "tokenizer they never occur, and what they learned is not used.",
        "the adapter's tokenizer has 151,700 tokens, the model's 151,669, both have 151,936 rows.",
        "lexigraft merge BASE ADAPTER -o MERGED",
    ),
    "LG407": Code(
        "error",
        "the adapter's tokenizer has more tokens than anything holds rows for",
        "The embedding was resized for the training but not saved: PEFT's save_embedding_layers "
        "was off, or another tokenizer was copied beside the adapter.",
        "the tokenizer has 33,296 tokens, model and adapter hold 32,000 rows.",
        "merge it into the resized model that it was trained on",
    ),
    "LG408": Code(
        "error",
        "the adapter's tensors do not fit the model's",
        "It was trained on a model of another size or another kind.",
        "lora_A of q_proj has 4,096 columns, q_proj has 2,048.",
        "see base_model_name_or_path in adapter_config.json",
    ),
    "LG409": Code(
        "error",
        "the adapter cannot be read",
        "A cut download, or an adapter_model.bin, a pickle, which is never opened.",
        "adapter_model.safetensors announces more bytes than it has.",
        "save the adapter with a current version of PEFT",
    ),
    "LG410": Code(
        "warning",
        "a kind of adapter that merge refuses",
        "aLoRA, QALoRA, replicated layers and others need the model to be merged. The adapter "
        "itself may be sound.",
        "adapter_config.json has layer_replication.",
        "merge it with PEFT: PeftModel(...).merge_and_unload()",
    ),
    "LG411": Code(
        "warning",
        "the adapter trained rows of ids that have no token",
        "trainable_token_indices was counted from len(tokenizer) of another tokenizer, or from the "
        "rows of a padded model. What was trained is never used.",
        "trainable_token_indices ends at 32,040, its tokenizer has 32,016 tokens.",
        "train again with the ids of the new tokens",
    ),
    "LG412": Code(
        "warning",
        "adapters that were not trained one on the result of the other",
        "Several adapters were named. Two of them give one id to different tokens: each was "
        "trained on the model with a vocabulary of its own. Or one of them was trained on the "
        "result of another that is named after it.",
        "cardiology gives id 32,000 to `▁angina`, neurology to `▁ataxia`: merged one after the "
        "other, the rows of one would get the words of the other.",
        "lexigraft merge BASE ADAPTER ADAPTER --weights 1,1 -o MERGED",
    ),
    "LG501": Code(
        "error",
        "the manifest cannot be read",
        "lexigraft.json was edited, cut off, or written by a newer version.",
        "lexigraft.json is of format 99.",
        "copy lexigraft.json again from the step that wrote it, or update lexigraft",
    ),
    "LG502": Code(
        "error",
        "the tokenizer is not the one of the manifest",
        "Tokenizer files of another step or model were copied into the folder. The rows belong "
        "to the words of the manifest's tokenizer.",
        "token map 1f0c..., the manifest was written with 9ab2...",
        "copy the tokenizer files of the step that wrote this folder into it again",
    ),
    "LG503": Code(
        "error",
        "the weights have other rows than the manifest says",
        "Weights were resized, or copied from another step, after the manifest was written.",
        "the manifest says 32,016 rows, the weights have 32,064.",
        "copy the weights and the manifest from one folder",
    ),
    "LG504": Code(
        "warning",
        "the tokenizer comes from another manifest",
        "tokenizer_config.json carries the hash of the manifest it was written with, and that is "
        "no earlier state of the manifest beside it.",
        "tokenizer of run A and weights of run B, which learned the same number of tokens.",
        "copy the tokenizer files and the manifest from one folder",
    ),
    "LG505": Code(
        "error",
        "the installed versions read the manifest's probe text otherwise",
        "`learn` writes down some texts and their ids. transformers, as it is installed here, "
        "gives other ids from the same files: its versions differ in how they build a tokenizer "
        "(huggingface/transformers#46686). `--deep` alone sees it.",
        "`aspirin 100 mg` was [4, 371], transformers 5.0 reads [4, 12, 9].",
        "pip install with the versions that the manifest names",
    ),
    "LG601": Code(
        "error",
        "ids of the base mean other tokens here",
        "The tokenizer was trained anew, sorted, or belongs to another model, instead of being "
        "extended at its end. Every old row belongs to another word then.",
        "id 300 is `the` in the base and `ing` here.",
        "lexigraft learn BASE --corpus TEXT -o VOCAB",
    ),
    "LG602": Code(
        "error",
        "fewer rows than the base",
        "`resize_token_embeddings(len(tokenizer))` shrinks a padded table.",
        "the base has 151,936 rows, the result 151,669.",
        "lexigraft graft BASE VOCAB -o MODEL",
    ),
    "LG603": Code(
        "error",
        "a tensor of the base is missing or has another shape",
        "A merge or an export left it out, or the folder holds another model.",
        "model.norm.weight is missing.",
        "lexigraft graft BASE VOCAB -o MODEL",
    ),
    "LG701": Code(
        "error",
        "the weights hold NaN or infinity",
        "A training diverged, or numbers left the range of float16. One such row is in every "
        "softmax. `--deep` alone sees it.",
        "lm_head.weight holds NaN, first in row 31,999.",
        "take a checkpoint from before the training failed",
    ),
    "LG702": Code(
        "note",
        "rows of tokens that were never trained",
        "Reserved tokens, and tokens that no training text held: their rows vanish, equal each "
        "other, or lie among the padding rows. `--deep` alone sees it.",
        "248 rows of `<|reserved_special_token_...|>` in Llama 3.",
        "nothing to mend, as long as no text uses them",
    ),
    "LG703": Code(
        "warning",
        "a token that begins or ends texts was never trained",
        "eos or bos was set to a reserved token of the base, and LoRA did not train its row: the "
        "model never stops. `--deep` alone sees it.",
        "eos_token_id is `<|eot_id|>`, whose row in the base model is untrained.",
        "train that row, or name another token in the config",
    ),
    "LG704": Code(
        "warning",
        "new rows equal each other",
        "All new rows were started as one mean, and not trained. A model cannot tell such tokens "
        "apart. `--deep` alone sees it, and needs `--base` or a manifest to know what is new.",
        "1,296 new rows are all the mean of the old ones.",
        "lexigraft graft BASE VOCAB -o MODEL",
    ),
    "LG705": Code(
        "error",
        "tied by the config, but a different output head is stored",
        "Embedding and head were trained apart, and the config still ties them. Loaders drop one; "
        "the model repeats itself without end. `--deep` alone sees it.",
        "tie_word_embeddings is true, lm_head.weight differs from embed_tokens.weight.",
        "set tie_word_embeddings to false in config.json",
    ),
    "LG706": Code(
        "warning",
        "rows of old tokens are not the base's",
        "Right after a training of the whole table or a merge of one. Else an off-by-one in the "
        "code that started new rows has overwritten an old one. `--deep` alone sees it, and needs "
        "`--base` or a manifest.",
        "1 of 32,000 old rows differs from the base's: id 0.",
        "lexigraft graft BASE VOCAB -o MODEL",
    ),
    "LG707": Code(
        "warning",
        "padding rows are longer than the rows of tokens",
        "They were started from noise. Ids without a text get a share of the probability, are "
        "sampled, and decode to nothing. `--deep` alone sees it.",
        "a padding row has a norm of 7.1, rows of tokens one of 1.2.",
        "lexigraft graft BASE VOCAB -o MODEL",
    ),
    "LG708": Code(
        "error",
        "a tensor outside the vocabulary is not the base's, and no step changed it",
        "A disk or a copy damaged it, another program wrote into the folder, or the base is "
        "another version of this model. A graft leaves every such tensor as it is, a merge changes "
        "those that the manifest names. `--deep` alone sees it, and needs `--base` and a manifest.",
        "model.layers.7.mlp.up_proj.weight differs, the adapter was trained on q_proj and v_proj.",
        "lexigraft merge BASE ADAPTER -o MERGED",
    ),
    "LG709": Code(
        "warning",
        "a tensor outside the vocabulary is not the base's, and the adapter does not change it",
        "The program that merged the adapter changed or damaged it, or saved it in another type. "
        "Or the model was made from the base by more than this adapter. `--deep` alone sees it, "
        "and needs `--base` and `--adapter`, where no manifest tells.",
        "model.norm.weight differs, the adapter was trained on q_proj and v_proj.",
        "lexigraft merge BASE ADAPTER -o MERGED",
    ),
    "LG710": Code(
        "warning",
        "new rows are far longer or far shorter than old ones",
        "They were started from noise of a fixed size, whatever the size of the model's own rows "
        "(LLaMA-Factory's noise_init), or from next to nothing. Logits grow with the length of a "
        "row, so that such tokens are written everywhere or never. `--deep` alone sees it, and "
        "needs `--base` or a manifest to know what is new.",
        "new rows have a norm of 0.99, old ones of 0.16.",
        "lexigraft graft BASE VOCAB -o MODEL",
    ),
    "LG801": Code(
        "error",
        "the GGUF file cannot be read",
        "A cut download, or a file made to harm its reader. Its counts are held against its size "
        "before anything is read for them.",
        "its header describes 4,368,439,584 bytes, the file has 2,147,483,648.",
        "download it again",
    ),
    "LG802": Code(
        "error",
        "a GGUF file has not one row for each entry of its token list",
        "The tokenizer gained tokens that the model has no rows for, or vocab_size was changed by "
        "hand before the conversion. llama.cpp stops with `tensor 'token_embd.weight' has wrong "
        "shape`.",
        "token_embd.weight has 32,000 rows, the list 32,001 tokens.",
        "lexigraft check MODEL --for gguf, mend it, and convert again",
    ),
    "LG803": Code(
        "error",
        "scores or types of a GGUF file are not those of its token list",
        "A tool edited the token list alone. llama.cpp reads both by the id of the token, beyond "
        "their end too.",
        "32,001 tokens and 32,000 scores.",
        "python convert_hf_to_gguf.py MODEL",
    ),
    "LG804": Code(
        "error",
        "a special id of a GGUF file is not in its token list",
        "eos or pad was taken from another tokenizer. llama.cpp warns and takes the default of "
        "that kind of tokenizer instead, so that the model may never stop.",
        "tokenizer.ggml.eos_token_id = 32,001, the list ends at 31,999.",
        "gguf-set-metadata FILE tokenizer.ggml.eos_token_id ID",
    ),
    "LG805": Code(
        "error",
        "a GGUF file gives one text two ids",
        "A token was added that the vocabulary has already. llama.cpp ends with `GGML_ASSERT("
        "id_to_token.size() == token_to_id.size()) failed`.",
        "`<pad>` has the ids 0 and 32,000.",
        "mend the tokenizer of the model, and convert again",
    ),
    "LG911": Code(
        "error",
        "`--for gguf`: the converter will not know the tokenizer",
        "llama.cpp's converter names the pre-tokenizer of a byte-level model by the hash of the "
        "ids of one fixed text. A new token that occurs in that text changes the hash, and so does "
        "`prune`, which gives most tokens other ids.",
        "the new token ` multiple` is in the check text.",
        "lexigraft learn BASE --corpus TEXT -o VOCAB, which leaves such tokens out",
        "`get_vocab_base_pre` in llama.cpp's convert_hf_to_gguf.py",
    ),
    "LG912": Code(
        "error",
        "`--for gguf`: llama.cpp reads texts otherwise than the tokenizer",
        "llama.cpp joins the pieces of a SentencePiece model by their scores. New pieces that all "
        "have the score 0, or a tokenizer.json without its tokenizer.model (then all scores are "
        "equal), are joined in another order.",
        "`angina` is [371] in transformers and [285, 301] in llama.cpp.",
        "scores in the order of the merges: lexigraft learn BASE --corpus TEXT -o VOCAB",
        "`llm_tokenizer_spm` in llama.cpp's src/llama-vocab.cpp, `LlamaHfVocab.get_token_score` in "
        "gguf-py/gguf/vocab.py",
    ),
    "LG913": Code(
        "error",
        "`--for gguf`: ids or rows are lost in the conversion",
        "The converter writes as many entries as config.json says, and leaves out or stops at "
        "every id beyond. It names padding rows, but not where a SentencePiece tokenizer lacks its "
        "tokenizer.model. A text with two ids ends llama.cpp. The tokenizer is really written and "
        "read back here.",
        "the tokenizer has 32,004 tokens, config.json says 32,000.",
        "lexigraft graft BASE VOCAB -o MODEL, which sets vocab_size to the rows",
        "`_create_vocab_sentencepiece` (`ignore token ...: id is out of range`) and "
        "`get_vocab_base`, `_set_vocab_llama_hf` in convert_hf_to_gguf.py; "
        "`llama_vocab::impl::load` in src/llama-vocab.cpp",
    ),
    "LG914": Code(
        "error",
        "`--for gguf`: the adapter cannot be converted",
        "It holds whole tables, rows of tokens or DoRA's magnitudes; the converter takes the two "
        "factors of LoRA alone.",
        "`Unexpected name '...lm_head.weight': Not a lora_A or lora_B tensor`.",
        "lexigraft split BASE ADAPTER -o PAIR, and convert its base and adapter",
        "`get_tensors` in llama.cpp's convert_lora_to_gguf.py",
    ),
    "LG915": Code(
        "note",
        "`--for gguf`: a kind of tokenizer that is not looked at",
        "WordPiece and Unigram models are converted by code of each architecture.",
        "a T5 model, converted by `_set_vocab_t5`.",
        "nothing to mend",
        "`set_vocab` of each class in convert_hf_to_gguf.py",
    ),
    "LG916": Code(
        "note",
        "`--for gguf`: llama.cpp reads some texts otherwise, without new tokens",
        "It applies no normalizer, and puts a space before a text in its own way. That is so with "
        "the base as well.",
        "`  two` is [259, 1023] in llama.cpp and [29871, 1023] in transformers.",
        "nothing to mend",
        "`llm_tokenizer_spm` in llama.cpp's src/llama-vocab.cpp",
    ),
    "LG921": Code(
        "error",
        "`--for vllm`: vLLM refuses the adapter",
        "Servers share one base among adapters, so rows of the vocabulary, which are the base's, "
        "cannot be in one; nor can DoRA and biases.",
        "`vLLM only supports modules_to_save being None`, `...trainable_tokens_delta is "
        "unsupported LoRA weight`.",
        "lexigraft split BASE ADAPTER -o PAIR, and serve its base and adapter",
        "`PEFTHelper._validate_features` in vllm/lora/peft_helper.py, "
        "`parse_fine_tuned_lora_name` in vllm/lora/utils.py",
    ),
    "LG922": Code(
        "warning",
        "`--for vllm`: the adapter's rank is above the server's default",
        "vLLM reserves memory for a rank of 16 and refuses others at the first request.",
        "`LoRA rank 64 is greater than max_lora_rank 16`.",
        "vllm serve MODEL --enable-lora --max-lora-rank 64",
        "`PEFTHelper.validate_legal` in vllm/lora/peft_helper.py, `LoRAConfig` in vllm/config",
    ),
    "LG923": Code(
        "error",
        "`--for vllm`: too many rows for serving adapters",
        "The kernel of the head's logits has a limit: 33,024 rows in old versions, then 128,512, "
        "257,024, and 258,048 now.",
        "`When using LoRA, vocab size must be 32000 >= vocab_size <= 257024`.",
        "lexigraft merge BASE ADAPTER -o MERGED, and serve MERGED",
        "`LogitsProcessorWithLoRA.create_lora_weights` in vllm/lora/layers",
    ),
    "LG924": Code(
        "note",
        "`--for vllm`: rows are no multiple of 64",
        "vLLM pads a table to 64 rows per GPU. Versions before 0.7 stopped where adapters were "
        "served on several GPUs.",
        "`16004 must match 16032`.",
        "lexigraft graft BASE VOCAB --pad-to 64 -o MODEL",
        "vllm-project/vllm#12230, `VocabParallelEmbedding` in "
        "vllm/model_executor/layers/vocab_parallel_embedding.py",
    ),
    "LG931": Code(
        "error",
        "`--for transformers-4`: the tokenizer's class is one of transformers 5",
        "transformers 5 writes it on save_pretrained.",
        "`Tokenizer class TokenizersBackend does not exist or is not currently imported`.",
        "set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json",
        "`AutoTokenizer.from_pretrained` in models/auto/tokenization_auto.py of 4.57",
    ),
    "LG932": Code(
        "error",
        "`--for transformers-4`: extra_special_tokens is a list",
        "transformers 5 writes a list where 4 reads a map.",
        "`'list' object has no attribute 'keys'`.",
        "rename the key to additional_special_tokens in tokenizer_config.json",
        "`_set_model_specific_special_tokens` in tokenization_utils_base.py of 4.57",
    ),
    "LG933": Code(
        "error",
        "`--for transformers-4`: positions would be computed with another base frequency",
        "transformers 5 writes rope_parameters, 4 reads rope_theta and rope_scaling, and takes its "
        "default without a word: the model loads and writes nonsense on long texts.",
        "rope_parameters has rope_theta = 500,000, the default is 10,000.",
        "copy rope_theta and rope_scaling out of rope_parameters in config.json",
        "`__init__` of each class of config (models/llama/configuration_llama.py) of 4.57",
    ),
    "LG934": Code(
        "note",
        "`--for transformers-4`: dtype instead of torch_dtype",
        "transformers 5 writes dtype. Versions before 4.56 do not know it and load in float32.",
        "dtype is bfloat16.",
        "nothing to mend where 4.56 or later is used, or memory suffices",
        "`PretrainedConfig.__init__` in configuration_utils.py",
    ),
    "LG941": Code(
        "warning",
        "`--for tgi`: no tokenizer.json",
        "TGI's router counts tokens with the Rust tokenizer and needs this file; without it, it "
        "neither limits nor truncates prompts.",
        "`Could not find a fast tokenizer implementation`.",
        "save the tokenizer with transformers, which writes tokenizer.json",
        "`run` in text-generation-inference's router/src/server.rs",
    ),
    "LG942": Code(
        "error",
        "`--for tgi`: parts of the adapter are left out",
        "TGI looks for lora_A and lora_B of the model's layers, and only warns of what else there "
        "is: trained rows and tables are not used, and new tokens mean nothing.",
        "lm_head.weight is in the adapter.",
        "lexigraft split BASE ADAPTER -o PAIR, and serve its base and adapter",
        "`LoraConfig.map_weights_for_model` in server/text_generation_server/adapters/lora.py",
    ),
}


def explain(code: str) -> list[str]:
    """The story of a code, for a person to read.

    Raises:
        LexigraftError: there is no such code.
    """
    story = CODES.get(code.upper())
    if story is None:
        raise LexigraftError(
            f"no code {code}",
            needed=f"one of {', '.join(CODES)}",
            fix="lexigraft check --explain LG302",
        )
    return [
        f"{code.upper()} ({story.severity}): {story.meaning}",
        "",
        story.cause,
        "",
        f"example: {story.example}",
        f"mend:    {story.mend}",
        *([f"source:  {story.source}"] if story.source else []),
    ]


def markdown_table() -> list[str]:
    """The rows of the table in docs/check.md."""
    return [
        f"| {code} | {story.severity} | {story.meaning} | {story.cause}"
        + (f" Source: {story.source}." if story.source else "")
        + f" | {story.mend} |"
        for code, story in CODES.items()
    ]

"""The small model's tokenizer: a byte-level alphabet plus one token for each word of the problems.

Nothing is learnt: the vocabulary follows from the word list, so it is the same for every seed. Any
text encodes, because a word that is not in the vocabulary falls into its bytes; digits always stand
alone, so that numbers are read and written digit by digit. Knows words and the chat template. Does
not know problems' answers or the model.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fireworks_training.local.pretraining.problems import ANSWER_MARK, words

BOS, PAD, START, END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (BOS, PAD, START, END)
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# A word with the space before it, a single digit, a run of other signs, a single blank.
_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def build_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Builds the tokenizer with specials and chat template, for texts up to `context` tokens."""
    whole = [*ROLES, ANSWER_MARK, f" {ANSWER_MARK}", *words()]
    pieces = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # The byte-level alphabet writes a space as U+0120.
    pieces += [piece for word in whole if (piece := word.replace(" ", "\u0120")) not in pieces]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    # Without merges, `ignore_merges` makes the model take a whole word or else its single bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )

"""Data on the host: from files to numpy batches of fixed shape. Nothing here imports jax.

rows = read_rows("train.jsonl")                                          # rows.py: files, datasets
examples = [supervised_example(row) for row in rows]                     # formats.py: one shape for all formats
tokens = tokenize_sft_rows(examples, tokenizer, max_length=512)          # templates.py, tokenizers.py, tokenization.py
batch = collate_sft([tokens.rows[i] for i in batch_indices(...)], ...)   # batching.py, collation.py; packing.py

For data larger than memory: `LazyTokens(open_rows("train.jsonl"), tokenize)` in place of `tokens.rows` (lazy.py), and
`write_tokens("runs/books", "books.txt", tokenizer).windows(256)` in place of `text_windows` (streams.py).
"""

from jaxrl_llm.data.batching import batch_indices as batch_indices
from jaxrl_llm.data.batching import bucket_length as bucket_length
from jaxrl_llm.data.batching import split_indices as split_indices
from jaxrl_llm.data.collation import PreferenceBatch as PreferenceBatch
from jaxrl_llm.data.collation import PromptBatch as PromptBatch
from jaxrl_llm.data.collation import RatedBatch as RatedBatch
from jaxrl_llm.data.collation import TokenBatch as TokenBatch
from jaxrl_llm.data.collation import UnpairedBatch as UnpairedBatch
from jaxrl_llm.data.collation import collate_preference as collate_preference
from jaxrl_llm.data.collation import collate_prompts as collate_prompts
from jaxrl_llm.data.collation import collate_rated as collate_rated
from jaxrl_llm.data.collation import collate_sft as collate_sft
from jaxrl_llm.data.collation import collate_unpaired as collate_unpaired
from jaxrl_llm.data.collation import count_rows_without_targets as count_rows_without_targets
from jaxrl_llm.data.collation import rotate_completions as rotate_completions
from jaxrl_llm.data.examples import Instruction as Instruction
from jaxrl_llm.data.examples import Message as Message
from jaxrl_llm.data.examples import PreferenceExample as PreferenceExample
from jaxrl_llm.data.examples import PromptExample as PromptExample
from jaxrl_llm.data.examples import RatedExample as RatedExample
from jaxrl_llm.data.examples import SupervisedExample as SupervisedExample
from jaxrl_llm.data.examples import UnpairedExample as UnpairedExample
from jaxrl_llm.data.formats import preference_example as preference_example
from jaxrl_llm.data.formats import prompt_example as prompt_example
from jaxrl_llm.data.formats import rated_example as rated_example
from jaxrl_llm.data.formats import reward_columns as reward_columns
from jaxrl_llm.data.formats import supervised_example as supervised_example
from jaxrl_llm.data.formats import unpaired_examples as unpaired_examples
from jaxrl_llm.data.lazy import LazySequence as LazySequence
from jaxrl_llm.data.lazy import LazyTokens as LazyTokens
from jaxrl_llm.data.lazy import open_rows as open_rows
from jaxrl_llm.data.packing import PackedBatch as PackedBatch
from jaxrl_llm.data.packing import PackedTokens as PackedTokens
from jaxrl_llm.data.packing import collate_packed as collate_packed
from jaxrl_llm.data.packing import pack_rows as pack_rows
from jaxrl_llm.data.packing import text_windows as text_windows
from jaxrl_llm.data.rows import Row as Row
from jaxrl_llm.data.rows import as_rows as as_rows
from jaxrl_llm.data.rows import read_rows as read_rows
from jaxrl_llm.data.streams import TokenFile as TokenFile
from jaxrl_llm.data.streams import write_tokens as write_tokens
from jaxrl_llm.data.sums import one_digit_sums as one_digit_sums
from jaxrl_llm.data.templates import Segment as Segment
from jaxrl_llm.data.templates import render_example as render_example
from jaxrl_llm.data.templates import render_prompt as render_prompt
from jaxrl_llm.data.tokenization import tokenize_preference as tokenize_preference
from jaxrl_llm.data.tokenization import tokenize_preference_rows as tokenize_preference_rows
from jaxrl_llm.data.tokenization import tokenize_prompt as tokenize_prompt
from jaxrl_llm.data.tokenization import tokenize_prompt_rows as tokenize_prompt_rows
from jaxrl_llm.data.tokenization import tokenize_rated_rows as tokenize_rated_rows
from jaxrl_llm.data.tokenization import tokenize_sft as tokenize_sft
from jaxrl_llm.data.tokenization import tokenize_sft_rows as tokenize_sft_rows
from jaxrl_llm.data.tokenization import tokenize_unpaired_rows as tokenize_unpaired_rows
from jaxrl_llm.data.tokenizers import character_tokenizer as character_tokenizer
from jaxrl_llm.data.tokenizers import load_tokenizer as load_tokenizer
from jaxrl_llm.data.tokenizers import padding_id as padding_id
from jaxrl_llm.data.tokenizers import train_tokenizer as train_tokenizer
from jaxrl_llm.data.tokens import PreferenceTokens as PreferenceTokens
from jaxrl_llm.data.tokens import RatedTokens as RatedTokens
from jaxrl_llm.data.tokens import TokenizedRows as TokenizedRows
from jaxrl_llm.data.tokens import Tokens as Tokens
from jaxrl_llm.data.tokens import UnpairedTokens as UnpairedTokens
from jaxrl_llm.data.wordnet import wordnet_definitions as wordnet_definitions

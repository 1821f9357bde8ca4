"""Data on the host: from files to numpy batches of fixed shape. Nothing here imports jax.

rows = read_rows("train.jsonl")                                          # rows.py: files, datasets
examples = [supervised_example(row) for row in rows]                     # formats.py: one shape for all formats
tokens = tokenize_sft_rows(examples, tokenizer, max_length=512)          # templates.py, tokenizers.py, tokenization.py
batch = collate_sft([tokens.rows[i] for i in batch_indices(...)], ...)   # collation.py
"""

from jaxrl_llm.data.collation import PreferenceBatch as PreferenceBatch
from jaxrl_llm.data.collation import PromptBatch as PromptBatch
from jaxrl_llm.data.collation import TokenBatch as TokenBatch
from jaxrl_llm.data.collation import batch_indices as batch_indices
from jaxrl_llm.data.collation import collate_preference as collate_preference
from jaxrl_llm.data.collation import collate_prompts as collate_prompts
from jaxrl_llm.data.collation import collate_sft as collate_sft
from jaxrl_llm.data.collation import split_indices as split_indices
from jaxrl_llm.data.formats import Instruction as Instruction
from jaxrl_llm.data.formats import Message as Message
from jaxrl_llm.data.formats import PreferenceExample as PreferenceExample
from jaxrl_llm.data.formats import PromptExample as PromptExample
from jaxrl_llm.data.formats import SupervisedExample as SupervisedExample
from jaxrl_llm.data.formats import preference_example as preference_example
from jaxrl_llm.data.formats import prompt_example as prompt_example
from jaxrl_llm.data.formats import reward_columns as reward_columns
from jaxrl_llm.data.formats import supervised_example as supervised_example
from jaxrl_llm.data.rows import Row as Row
from jaxrl_llm.data.rows import as_rows as as_rows
from jaxrl_llm.data.rows import read_rows as read_rows
from jaxrl_llm.data.sums import one_digit_sums as one_digit_sums
from jaxrl_llm.data.templates import Segment as Segment
from jaxrl_llm.data.templates import render_example as render_example
from jaxrl_llm.data.templates import render_prompt as render_prompt
from jaxrl_llm.data.tokenization import PreferenceTokens as PreferenceTokens
from jaxrl_llm.data.tokenization import TokenizedRows as TokenizedRows
from jaxrl_llm.data.tokenization import Tokens as Tokens
from jaxrl_llm.data.tokenization import tokenize_preference as tokenize_preference
from jaxrl_llm.data.tokenization import tokenize_preference_rows as tokenize_preference_rows
from jaxrl_llm.data.tokenization import tokenize_prompt as tokenize_prompt
from jaxrl_llm.data.tokenization import tokenize_prompt_rows as tokenize_prompt_rows
from jaxrl_llm.data.tokenization import tokenize_sft as tokenize_sft
from jaxrl_llm.data.tokenization import tokenize_sft_rows as tokenize_sft_rows
from jaxrl_llm.data.tokenizers import character_tokenizer as character_tokenizer
from jaxrl_llm.data.tokenizers import load_tokenizer as load_tokenizer
from jaxrl_llm.data.tokenizers import padding_id as padding_id
from jaxrl_llm.data.wordnet import wordnet_definitions as wordnet_definitions

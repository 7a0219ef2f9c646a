"""Every number, list of ids and size that a client may send, with its range: one table.

A name means the same on every route, so the table has one row for it; one name differs in chats.
What is not here is text, or SGLang's own to check; ``tests/sglang_plugin/test_installed_sglang.py``
fails for a number of a route that is neither here nor known there. Ranges are SGLang's own,
OpenAI's where SGLang has none, and where neither has one what a server survives.
"""

from kt_kernel.sglang_plugin.edge.kinds import (
    MAX_CHARACTERS,
    ByToken,
    Either,
    Embeddings,
    Fields,
    Flag,
    IdsOrLists,
    Integer,
    Internal,
    JsonText,
    Kind,
    Number,
    Object,
    OneOrList,
    Pattern,
    Prompt,
    RequestId,
    Text,
    TokenIds,
    context,
)

INT32 = (1 << 31) - 1
INT64 = (1 << 63) - 1

MAX_CHOICES = 128
"""Answers to one prompt: OpenAI's limit."""

MAX_ANSWERS = 4096
"""Of one request: its prompts times its choices. Each takes memory until the last one is done."""

MAX_LOGPROBS = 1 << 22
"""Candidates told for all tokens of an answer: a gigabyte until it ends. 25 for each of 163840."""

MAX_IDS = 1024
"""Token ids that a client may list beside a prompt."""

COUNT = Integer(0, INT32)
SIZE = Integer(1, INT32)
TOKENS = Integer(0, context)
TOP_LOGPROBS = Integer(0, lambda limits: limits.vocabulary)
PENALTY = Number(-2, 2)
# The empty string is in every answer: each would end before it begins.
STRINGS = OneOrList(Text(1024, least=1))
IDS = TokenIds(MAX_IDS)
PORT = Integer(0, 65535)
RANK = Integer(0, 1023)

SAMPLING: dict[str, Kind] = {
    "max_new_tokens": TOKENS,
    "min_new_tokens": TOKENS,
    "n": Integer(1, MAX_CHOICES),
    "beam_width": Integer(1, MAX_CHOICES),
    "temperature": Number(0, 100),
    "top_p": Number(0, 1, above=True),
    "top_k": Integer(1, INT32, aside=-1),
    "min_p": Number(0, 1),
    "frequency_penalty": PENALTY,
    "presence_penalty": PENALTY,
    # Logits are divided by it: below, they become infinite, and sampling fails on NaN.
    "repetition_penalty": Number(0.01, 2),
    "logit_bias": ByToken(Number(-100, 100)),
    "stop": STRINGS,
    "stop_token_ids": IDS,
    "stop_regex": OneOrList(Pattern()),
    "sampling_seed": Integer(-INT64 - 1, INT64),
    "stream_interval": SIZE,
    "json_schema": JsonText(),
    "regex": Text(MAX_CHARACTERS),
    "ebnf": Text(MAX_CHARACTERS),
    "structural_tag": JsonText(),
    "ignore_eos": Flag(),
    "skip_special_tokens": Flag(),
    "spaces_between_special_tokens": Flag(),
    "no_stop_trim": Flag(),
    "custom_params": Fields({"thinking_budget": TOKENS}),
    # Derived by SGLang from the ones above; is_normalized leaves all of that out.
    "stop_strs": Internal(),
    "stop_regex_strs": Internal(),
    "stop_str_max_len": Internal(),
    "stop_regex_max_len": Internal(),
    "is_normalized": Internal(),
    "ebnf_full_assistant": Internal(),
}
"""Fields of SGLang's ``SamplingParams``."""

OPENAI: dict[str, Kind] = {
    "max_tokens": TOKENS,
    "max_completion_tokens": TOKENS,
    "max_output_tokens": TOKENS,
    "min_tokens": TOKENS,
    "max_tool_calls": COUNT,
    "best_of": Integer(1, MAX_CHOICES),
    "seed": Integer(-INT64 - 1, INT64),
    # A number of candidates: of completions, where true is taken for 1.
    "logprobs": Either((Flag(), TOP_LOGPROBS)),
    "top_logprobs": TOP_LOGPROBS,
    "stop_sequences": STRINGS,
    # SGLang looks into it before it has checked what it is.
    "response_format": Object(
        {"schema": Object({"properties": Object({})}), "json_schema": Object({})}
    ),
    "prompt": Prompt(),
    "input": Prompt(),
    "tokens": IdsOrLists(),
    "query": Prompt(),
    "items": Prompt(),
    "label_token_ids": IdsOrLists(IDS),
    "embed_override_token_id": Integer(0, lambda limits: limits.vocabulary - 1),
    "dimensions": SIZE,
    "top_n": SIZE,
    "prompt_format_version": COUNT,
    "reasoning_effort": Either((Text(), Number(0, 1))),
    "thinking": Fields({"budget_tokens": COUNT}),
    "options": Fields(
        {
            name: SAMPLING[name]
            for name in ("temperature", "top_p", "top_k", "stop", "presence_penalty")
        }
        | {
            "frequency_penalty": PENALTY,
            "num_predict": TOKENS,
            "num_ctx": COUNT,
            "seed": Integer(-INT64 - 1, INT64),
        }
    ),
    "context": TokenIds(),
    "keep_alive": Either((Text(), Number(-1e9, 1e9))),
}
"""Fields of OpenAI's, Anthropic's and Ollama's protocols."""

GENERATE: dict[str, Kind] = {
    "rid": OneOrList(RequestId()),
    "session_id": Text(256),
    "text": Prompt(),
    # An empty list, not one among several, may continue a session.
    "input_ids": IdsOrLists(least=1),
    "input_embeds": Embeddings(),
    "sampling_params": Fields(SAMPLING),
    "return_logprob": OneOrList(Flag()),
    "logprob_start_len": OneOrList(Integer(-1, context)),
    "top_logprobs_num": OneOrList(TOP_LOGPROBS),
    "token_ids_logprob": IdsOrLists(IDS),
    "routed_experts_start_len": TOKENS,
    "max_thinking_tokens": TOKENS,
    "priority": Integer(-INT32 - 1, INT32),
    "session_params": Fields(
        {
            "id": Text(256),
            "rid": Text(256),
            "offset": Integer(lambda limits: -limits.context, context),
            "replace": Flag(),
            "drop_previous_output": Flag(),
        }
    ),
    "bootstrap_port": OneOrList(PORT),
    "bootstrap_room": OneOrList(Integer(0, INT64)),
    "decode_tp_size": OneOrList(Integer(1, 1024)),
    "routed_dp_rank": RANK,
    "data_parallel_rank": RANK,
    "disagg_prefill_dp_rank": RANK,
    "max_dynamic_patch": SIZE,
    "min_dynamic_patch": SIZE,
    "image_max_dynamic_patch": SIZE,
    "video_max_dynamic_patch": SIZE,
    **dict.fromkeys(
        (
            "stream",
            "return_text_in_logprobs",
            "return_prompt_token_ids",
            "return_routed_experts",
            "return_indexer_topk",
            "return_entropy",
            "return_flat_raw_top_logprobs",
            "return_flat_raw_output_top_logprobs",
            "return_flat_raw_top_logprobs_b64",
            "require_reasoning",
            "log_metrics",
            "no_logs",
            "background",
        ),
        Flag(),
    ),
    **dict.fromkeys(
        (
            "http_worker_ipc",
            "lora_id",
            "positional_embed_overrides",
            "embed_overrides",
            "query_embed_overrides",
            "item_embed_overrides",
            "multi_item_delimiter_indices",
            "token_indices_to_pool",
            "decision_layout",
            "need_wait_for_mm_inputs",
            "num_items_assigned",
            "encoder_urls",
            "kv_hints",
            "received_time",
            "external_trace_header",
            "custom_labels",
            "return_bytes",
        ),
        Internal(),
    ),
}
"""Fields of SGLang's own requests, ``GenerateReqInput`` and ``EmbeddingReqInput``."""

ADMINISTRATION: dict[str, Kind] = {
    "forward_sleep_time": Number(0, 3600),
    "capacity_of_str_len": COUNT,
    "timeout": Number(0, 1e9),
    "start_step": COUNT,
    "num_steps": COUNT,
    "truncate_size": COUNT,
    "token_step": COUNT,
    "log_requests_level": Integer(0, 3),
    "dump_requests_threshold": SIZE,
    "master_port": PORT,
    "world_size": Integer(1, 1024),
    "group_rank": RANK,
    "rank_offset": RANK,
    "finished_reason": Internal(),
}
"""Numbers of the routes for whoever runs the server."""

FIELDS: dict[str, Kind] = {**ADMINISTRATION, **SAMPLING, **OPENAI, **GENERATE}
"""By the names at the top of a request."""

CHAT_FIELDS: dict[str, Kind] = {**FIELDS, "logprobs": Flag()}
"""The same of a request with messages: the number is in ``top_logprobs``."""

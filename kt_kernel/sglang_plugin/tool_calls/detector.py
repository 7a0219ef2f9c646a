"""What takes the place of the methods of SGLang's ``DeepSeekV32Detector``."""

from typing import Any

from kt_kernel.sglang_plugin.tool_calls.dsml import Call, Reader, Tags, read, to_json


def has_tool_call(detector: Any, text: str) -> bool:
    """Whether ``text`` has markup of calls."""
    return _tags(detector).start in text


def detect_and_parse(detector: Any, text: str, tools: list[Any]) -> Any:
    """The ``StreamingParseResult`` of a whole answer."""
    prose, calls = read(text, _tags(detector))
    return _result(prose, _items(detector, calls, tools, 0))


def parse_streaming_increment(detector: Any, new_text: str, tools: list[Any]) -> Any:
    """The ``StreamingParseResult`` of one more piece of an answer."""
    reader = vars(detector).setdefault("_kt_reader", Reader(_tags(detector)))
    prose, calls = reader.feed(new_text)
    items = _items(detector, calls, tools, len(detector.prev_tool_call_arr))
    # What SGLang looks at when the stream ends: the held text to release, and the calls, of whose
    # arguments nothing is left to send.
    detector._buffer = reader.held
    for item in items:
        detector.prev_tool_call_arr.append({"name": item.name, "arguments": item.parameters})
        detector.streamed_args_for_tool.append(item.parameters)
        detector.current_tool_id = len(detector.prev_tool_call_arr)
    return _result(prose, items)


def _tags(detector: Any) -> Tags:
    # SGLang 0.5.16 has the names in its patterns only. V4's detector is a subclass.
    names = {"mark": "dsml_token", "invoke": "invoke_tag_name", "parameter": "parameter_tag_name"}
    return Tags(**{k: getattr(detector, v) for k, v in names.items() if hasattr(detector, v)})


def _items(detector: Any, calls: list[Call], tools: list[Any], first: int) -> list[Any]:
    """SGLang's items, numbered from ``first``, without functions that are not in ``tools``."""
    items: list[Any] = []
    for call in calls:
        found = detector.parse_base_json({"name": call.name, "parameters": call.arguments}, tools)
        for item in found:
            item.tool_index = first + len(items)
            item.parameters = to_json(call.arguments)
            items.append(item)
    return items


def _result(prose: str, items: list[Any]) -> Any:
    from sglang.srt.function_call.core_types import StreamingParseResult

    return StreamingParseResult(normal_text=prose, calls=items)

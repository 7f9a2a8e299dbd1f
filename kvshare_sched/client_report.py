"""The report in the client's answer; runs in the tokenizer process.

SGLang collects `customized_info` as a list per output token. Ours is one object per answer: it arrives with
the first output and is repeated in the `meta_info` of every later chunk of the same answer.
"""

from __future__ import annotations

_ATTRIBUTE = "kvshare_report"


def update_request_meta_info(original, manager, meta_info, state, customized_info, index, finish_reason):
    """Around `TokenizerManager.update_request_meta_info`: our key becomes one object, not a list."""
    if "kvshare" in customized_info:
        reports = [r for r in customized_info["kvshare"][index] or () if r is not None]
        if reports:
            setattr(state, _ATTRIBUTE, reports[0])
        customized_info = {k: v for k, v in customized_info.items() if k != "kvshare"}
    report = getattr(state, _ATTRIBUTE, None)
    if report is not None:
        meta_info["kvshare"] = report
    return original(manager, meta_info, state, customized_info, index, finish_reason)


def hooks() -> dict[str, object]:
    """Seam -> hook body, all of kind AROUND."""
    return {
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info": update_request_meta_info,
    }

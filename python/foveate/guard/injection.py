"""Signs of prompt injection: texts that speak to the model over the head of whoever set it up. Heuristics, in six languages."""

from __future__ import annotations

import re

_SIGNS = {
    "ignore-instructions": [
        r"\b(?:ignore|disregard|forget|override|bypass)\b[^.\n]{0,40}?\b(?:previous|prior|above|earlier|preceding|all|your|these|those)\b"
        r"[^.\n]{0,30}?\b(?:instructions?|prompts?|rules?|guidelines?|directions?|constraints?)\b",
        r"\b(?:ignoriere|vergiss|missachte)\b[^.\n]{0,40}?\b(?:anweisungen|vorgaben|regeln|instruktionen)\b",
        r"\b(?:ignore[zr]?|oublie[zr]?)\b[^.\n]{0,40}?\b(?:instructions|consignes|règles)\b",
        r"\b(?:ignora|olvida|omite)\b[^.\n]{0,40}?\b(?:instrucciones|reglas|indicaciones)\b",
        r"\b(?:ignora|dimentica)\b[^.\n]{0,40}?\b(?:istruzioni|regole)\b",
        r"(?:忽略|无视|忘记|忘掉|不要理会)[^。\n]{0,12}?(?:之前|以上|上面|先前|所有|前面|你的)[^。\n]{0,12}?(?:指令|指示|提示|规则|要求|限制)",
    ],
    "reveal-prompt": [
        r"\b(?:reveal|show|print|repeat|output|display|leak|tell me|give me)\b[^.\n]{0,40}?"
        r"\b(?:system|hidden|initial|original|secret|developer)\b[^.\n]{0,20}?\b(?:prompt|instructions?|message|rules?)\b",
        r"(?:显示|告诉我|输出|泄露|透露|重复|打印)[^。\n]{0,12}?(?:系统|初始|隐藏|原始)[^。\n]{0,6}?(?:提示|指令|消息|设定)",
    ],
    "no-limits": [
        r"\b(?:you are now|from now on|act as|pretend to be|pretend you are|behave as)\b[^.\n]{0,60}?"
        r"\b(?:DAN|jailbroken|unrestricted|unfiltered|uncensored|without (?:any )?(?:restrictions?|rules|filters?|limits|limitations))\b",
        r"\b(?:DAN|jailbreak|developer|god) mode\b",
        r"(?:你现在是|从现在开始|扮演|假装)[^。\n]{0,30}?(?:没有|不受)[^。\n]{0,6}?(?:限制|约束|规则)",
    ],
    "template-tokens": [
        r"<\|(?:im_start|im_end|im_sep|system|user|assistant|endoftext|begin_of_text|eot_id|start_header_id|end_header_id)\|>",
        r"\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>",
    ],
    "hidden-text": [
        "[\U000e0000-\U000e007f]+",  # tag characters spell ASCII without being seen
        r"[\u200b\u2060\u2062-\u2064\ufeff]{3,}",
        r"[\u202a-\u202e\u2066-\u2069]",  # they let a text look otherwise than it is read
    ],
    "encoded": [r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{160,4000}={0,2}(?![A-Za-z0-9+/=])"],
}  # fmt: skip
SIGNS = tuple(_SIGNS)


def patterns(signs: tuple[str, ...] = SIGNS) -> list[tuple[str, re.Pattern[str]]]:
    return [(sign, re.compile(text, re.IGNORECASE)) for sign in signs for text in _SIGNS[sign]]

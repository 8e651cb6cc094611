"""A chat template with tokens of its own around calls, as a user may write it."""

from typing import Any

ADDED: list[Any] = ["<call>", {"text": "</call>", "special": True}, {"text": "<note>", "special": False}]
"""`data.added_tokens` for it."""

TEMPLATE = """\
{{- bos_token }}
{%- if tools %}{{ "[AVAILABLE_TOOLS]" + tools | tojson + "[/AVAILABLE_TOOLS]" }}{% endif %}
{%- for message in messages %}
  {%- if message.role == "assistant" %}
    {%- generation %}
      {{- message.content or "" }}
      {%- for call in message.tool_calls or [] %}
        {{- "<call>" + call.function | tojson + "</call>" }}
      {%- endfor %}
      {{- eos_token }}
    {%- endgeneration %}
  {%- else %}
    {{- "[INST]" + message.role + ": " + message.content + "[/INST]" }}
  {%- endif %}
{%- endfor %}
"""

"""The model card of a saved adapter: what it is, what it scored, how to load it. Its licence is its author's to state.

In: what `router_config.json` says, and scores by name. Out: Markdown with the Hub's header. Next: store.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

CARD = """\
---
{header}---

# {method} on {base}

An adapter made with [AdaFuse's replication](https://arxiv.org/abs/2603.11873) `adafuse`: {what}.

| | |
| --- | --- |
| method | {method} (routing: {routing}) |
| backbone | {base} |
| linears | {targets} |
{rows}
It works on this backbone alone: `router_config.json` holds a fingerprint of its weights, which is checked on loading.

## Load it

```python
import adafuse

adapted = adafuse.load({base_code}, adapter="FOLDER")
```

`FOLDER` holds this file, as `huggingface_hub.snapshot_download` leaves it.
{peft}
## Licence

Not stated yet: add `license:` to the lines at the top of this file. The backbone's own licence holds for its use.
"""
PEFT = """
One expert alone, with PEFT and nothing else:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

backbone = AutoModelForCausalLM.from_pretrained({base_code})
model = PeftModel.from_pretrained(backbone, "FOLDER", subfolder="{expert}")
```
"""
# the Hub takes no other name of a base model
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def text(description: Mapping[str, Any], scores: Mapping[str, float]) -> str:
    """The whole file; the same for the same adapter and scores."""
    method, experts, base = description["method"], description["experts"], description["base_model"]
    count, rank = method.get("count") or experts["count"], method.get("rank") or experts["rank"]
    top_k = min(experts["top_k"], count)
    what = (
        f"{count} experts of rank {rank}, {top_k} of them for a token"
        if count > 1
        else f"LoRA of rank {rank}"
    )
    rows = [("experts", count), ("rank", rank), ("top-k", top_k if count > 1 else "")]
    rows += [(name, f"{value:.4g}") for name, value in scores.items()]
    header = f"base_model: {base}\n" if _HUB_ID.fullmatch(base) else ""
    folders = description["folders"]
    return CARD.format(
        header=header + "library_name: adafuse\ntags: [lora, peft, mixture-of-experts, adafuse]\n",
        method=method["name"],
        routing=method["routing"],
        what=what,
        base=_plain(base),
        base_code=json.dumps(base),
        targets=", ".join(
            experts["targets"] if method.get("expert_targets") is None else method["expert_targets"]
        ),
        rows="".join(f"| {_plain(str(name))} | {value} |\n" for name, value in rows if value != ""),
        peft=PEFT.format(base_code=json.dumps(base), expert=folders[0]) if folders else "",
    )


def _plain(words: str) -> str:
    """Without what would be markup."""
    return re.sub(r"[^\w./ :-]", "_", words)

"""Settings that shape prompts: what runs from before them recorded, and dates that are none."""

import pytest

from megatron_jq.config import Config, parse_args, settings_of_text, to_toml
from megatron_jq.config_validate import derive
from megatron_jq.errors import UserError


def test_the_record_of_a_run_from_before_add_bos_token_says_that_its_prompts_had_none():
    now = to_toml(Config())
    before = "".join(line for line in now.splitlines(keepends=True) if not line.startswith("add_bos_token"))
    assert settings_of_text(now, "x").data.add_bos_token == "auto"
    assert settings_of_text(before, "x").data.add_bos_token == "off"
    assert settings_of_text("", "x").data.add_bos_token == "off"


@pytest.mark.parametrize("date", ["today", "2024-13-01", "26 Jul 2024", ""])
def test_a_chat_date_that_is_none_is_refused(date):
    with pytest.raises(UserError, match="--chat-date must be a date as YYYY-MM-DD"):
        derive(parse_args(["--chat-date", date]), 1)

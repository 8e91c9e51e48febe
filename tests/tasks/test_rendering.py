"""Templates of somebody else end, or are refused with words."""

from __future__ import annotations

import pytest

from pimerge.core import confined
from pimerge.core.errors import PimergeError
from pimerge.tasks.types._templates import Template

HOSTILE = {
    "a long string": "{{ ('a' * 4000000000)|length }}",
    "a wide field": "{{ text|center(4000000000)|length }}",
    "a wide format": "{{ '%4000000000d' % 1 }}",
    "a wide format of str": "{{ '{:>4000000000}'.format(text) }}",
    "a long list": "{{ ([0] * 900000000)|length }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ (9 ** (9 ** 9)) % 3 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "depth": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "indents": "{{ ('a\n' * 200000)|indent(20000)|length }}",
    "a long output": "{% for a in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_without_an_end_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "SECONDS", 0.7)
    with pytest.raises(PimergeError) as error:
        Template("prompt", source).text({"text": "cat"})
    assert "prompt" in str(error.value)
    assert Template("prompt", "{{ text }}!").text({"text": "cat"}) == "cat!"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ text|attr('__class__') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as o %}{{ o }}",
    ],
)
def test_a_template_does_not_leave_its_sandbox(source: str) -> None:
    with pytest.raises(PimergeError, match="prompt"):
        Template("prompt", source).text({"text": "cat"})


def test_long_chains_and_wide_tables_are_no_attack() -> None:
    many = {f"c{index}": index for index in range(300)}
    source = " ".join(f"{{{{ {name} }}}}" for name in many)
    assert Template("prompt", source).text(many) == " ".join(map(str, range(300)))
    assert Template("prompt", "{{ 'ab' * 3 }}").text({}) == "ababab"

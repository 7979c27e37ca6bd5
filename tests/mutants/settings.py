"""Settings as they were typed, and a command's options."""

from tests.mutants import Mutant

CONFIG, YAML, OPTIONS = "dflash_dist/config.py", "dflash_dist/typed_yaml.py", "dflash_dist/options.py"
TEST_CONFIG, TEST_YAML, TEST_OPTIONS = "tests/test_config.py", "tests/test_typed_yaml.py", "tests/test_options.py"

MUTANTS = [
    Mutant(
        "an unknown key is refused",
        YAML,
        '{"extra": "forbid", "allow_inf_nan": False}',
        '{"extra": "ignore", "allow_inf_nan": False}',
        TEST_CONFIG,
    ),
    Mutant(
        "no number is infinite",
        YAML,
        '{"extra": "forbid", "allow_inf_nan": False}',
        '{"extra": "forbid"}',
        TEST_YAML,
    ),
    Mutant(
        "an empty section has its defaults",
        YAML,
        "return {} if value is None else value",
        "return value",
        TEST_YAML,
    ),
    Mutant(
        "a whole number is not rounded",
        YAML,
        "return int(number) if number == int(number) else float(number)",
        "return float(number)",
        TEST_YAML,
    ),
    Mutant(
        "a quoted truth is text",
        YAML,
        "if not isinstance(value, Plain) or value.lower() not in TRUTHS:",
        "if value.lower() not in TRUTHS:",
        TEST_YAML,
    ),
    Mutant(
        "a quoted template argument is text",
        YAML,
        "return _free(value, where) if kind is Any and isinstance(value, Plain) else value",
        "return _free(value, where) if kind is Any and isinstance(value, str) else value",
        TEST_YAML,
    ),
    Mutant(
        "a key that stands twice is refused",
        YAML,
        "if key.value in lines and key.tag != MERGE:",
        "if False:",
        TEST_YAML,
    ),
    Mutant(
        "what a section states wins over what it merges",
        YAML,
        "self.flatten_mapping(node)  # merges what << names",
        "[key for key, _ in node.value if key.tag == MERGE] and (self.flatten_mapping(node), node.value.reverse())",
        TEST_YAML,
    ),
    Mutant(
        "an override keeps what the file says beside it",
        YAML,
        "return tree | {name: put(tree.get(name), inner) if inner else value}",
        "return {name: put(tree.get(name), inner) if inner else value}",
        TEST_CONFIG,
    ),
    Mutant(
        "of a union, what is wrong inside is told",
        YAML,
        'sorted(error.errors(include_url=False), key=lambda one: len(one["loc"]))',
        'sorted(error.errors(include_url=False), key=lambda one: -len(one["loc"]))',
        TEST_YAML,
    ),
    Mutant(
        "a mistake in an override is not blamed on the file",
        YAML,
        "{f'override {names[by]!r}' if by else path}",
        "{path}",
        TEST_YAML,
    ),
    Mutant("what others call a knob is known", YAML, "    if key in synonyms:\n", "    if False:\n", TEST_YAML),
    Mutant(
        "what a later version dropped does not keep a run from being read",
        CONFIG,
        "return read(Config, _there(path), unknown=[] if unknown is None else unknown)",
        "return read(Config, _there(path))",
        f"{TEST_CONFIG} tests/export/test_export.py",
    ),
    Mutant(
        "a config that cannot be is refused",
        CONFIG,
        "    if reasons := list(_impossible(config)):\n        raise ValueError(",
        "    if reasons := list(_impossible(config)):\n        print(",
        TEST_CONFIG,
    ),
    Mutant(
        "a mistake of use ends with status 2",
        OPTIONS,
        "        parser.error(str(error))",
        "        raise",
        TEST_OPTIONS,
    ),
    Mutant(
        "overrides may stand anywhere",
        OPTIONS,
        "parser.parse_intermixed_args(argv)",
        "parser.parse_args(argv)",
        TEST_OPTIONS,
    ),
]

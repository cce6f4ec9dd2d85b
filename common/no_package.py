"""What `pip install .` meets, as pyproject.toml has it: this repository is used from its checkout."""


def get_requires_for_build_wheel(config_settings=None):
    raise SystemExit("amoe is no package: use it from its checkout, by PYTHONPATH=CHECKOUT (docs/student.md)")


build_editable = get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel

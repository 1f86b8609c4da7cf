# What the image build generates as tables.py, see guest/image/schema.py.

MESSAGES: dict[str, dict[int, tuple[str, str, str, str]]]
METHODS: dict[str, dict[str, tuple[str, str]]]

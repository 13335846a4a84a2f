"""The same examples in every run, so that only a change can break it; new ones where PAGODA_TEST_LONG asks for more."""

import os

from hypothesis import settings

if os.environ.get("PAGODA_TEST_LONG") != "1" and settings.get_current_profile_name() == "default":
    settings.load_profile("ci")

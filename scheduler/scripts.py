"""The Lua scripts, loaded once, under their names."""

from scheduler.lua import load_script
from scheduler.redis_node import Script

STEP = Script(load_script("step"))
SEIZE = Script(load_script("seize"))
RECLAIM = Script(load_script("reclaim"))
REQUEST_CREATE = Script(load_script("request_create"))
REQUEST_OWN = Script(load_script("request_own"))
REQUEST_END = Script(load_script("request_end"))
ALL_SCRIPTS = (STEP, SEIZE, RECLAIM, REQUEST_CREATE, REQUEST_OWN, REQUEST_END)

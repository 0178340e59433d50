"""Tests of moe.parallel: many processes against one."""

"""Frames of videos as scripts import them: `media_av` under its short name."""

from tinyvl.media_av import Clips, load_frames

__all__ = ["Clips", "load_frames"]

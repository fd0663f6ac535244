"""Every sentence that a user can be told, and nothing else that a user can be told.

One function a check or a sentence, grouped by the module that calls it. The form is
``l2t.<op>: <argument> must be <requirement>, got <actual>. <What to do>.`` Each is provoked by a test.
"""

from __future__ import annotations

//! F4: preflight, install, remove.

//! F4: the only place where parts are wired.

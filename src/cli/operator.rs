//! Who gives a command: the name, for the journal, and Ctrl-C.

use tokio::sync::watch;

use crate::ports::Stop;

/// The operator's name at this machine: `user@host`.
pub fn name() -> String {
    let user = ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
    let user = user.unwrap_or_else(|| format!("uid {}", rustix::process::getuid().as_raw()));
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{user}@{host}")
}

/// Becomes true when the operator presses Ctrl-C, for work that then ends in order.
pub fn interrupted() -> Stop {
    let (stopper, stop) = watch::channel(false);
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            stopper.send_replace(true);
        } else {
            std::future::pending::<()>().await;
        }
    });
    stop
}

//! An SQL session with every setting pinned that could change how values are read or written.

use std::ops::{Deref, DerefMut};

use tokio_postgres::config::SslMode;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls};
use tracing::Instrument;

use super::dial::Purpose;
use super::login;
use super::resumed::Resumed;
use super::sqlstate;
use crate::config::ConnInfo;
use crate::model::Result;
use crate::telemetry::notice;

/// A session; dropping it ends it once the statement under way has ended.
pub struct Session {
    /// For statements, prepared or not, COPY and transactions.
    pub client: Client,
    /// `server_version_num`: 150018 for 15.18.
    pub version: u32,
    /// Process id of the backend, as `pg_stat_activity` and `pg_locks` show it.
    pub backend_pid: u32,
    /// The connection is encrypted.
    pub tls: bool,
}

impl Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

/// Connects and logs in; `application` is shown in `pg_stat_activity` unless the connection string names another.
///
/// # Errors
/// `Unreachable`, `ServerBusy` (transient); `BadCredentials`, `BadTls`, `BadSecret`; `BadSetting` for a server older than
/// 15.
pub async fn connect(info: &ConnInfo, application: &str) -> Result<Session> {
    let login = login::login(info, Purpose::Sql, application).await?;
    let stream = Resumed::new(login.io, login.greeting);
    let mut config = Config::new();
    config.user(&info.user).ssl_mode(SslMode::Disable);
    let (client, mut connection) = config.connect_raw(stream, NoTls).await.map_err(|error| sqlstate::fault(&error))?;
    let place = info.to_string();
    let listening = async move {
        while let Some(event) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            match event {
                Ok(AsyncMessage::Notice(notice)) => {
                    tracing::warn!(notice = notice::SERVER_SAYS, server = %place, sqlstate = notice.code().code(), "{}", notice.message());
                }
                Ok(_) => {}
                Err(error) => {
                    // The statement under way, or the next one, ends with the error too; it is handled there.
                    tracing::debug!(server = %place, error = %sqlstate::fault(&error).what, "session ended");
                    return;
                }
            }
        }
    };
    tokio::spawn(listening.in_current_span());
    let session = Session { client, version: login.version, backend_pid: login.backend_pid, tls: login.tls };
    // Not a startup parameter: servers before 17 would refuse the unknown name.
    if session.version >= 170_000 {
        let pin = session.batch_execute("SET transaction_timeout = 0").await;
        pin.map_err(|error| sqlstate::fault(&error).at(info))?;
    }
    Ok(session)
}

//! Sockets: TCP or Unix, and how `sslmode` turns one into a TLS stream.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, UnixStream};

use super::gather::Road;
use super::socket::Socket;
use super::tls::{self, DialError, TlsPlan};
use crate::config::{HostPort, SslMode};
use crate::model::{Code, Fault};

/// A connected byte stream, encrypted or not.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A stream that a login can start on.
pub(super) struct Dialed {
    pub(super) io: Box<dyn Io>,
    /// TLS is on.
    pub(super) tls: bool,
    pub(super) road: Road,
    /// Hash of the server's certificate for `tls-server-end-point` (RFC 5929, section 4.1).
    pub(super) end_point: Option<Vec<u8>>,
}

/// Where one attempt goes.
#[derive(Debug, Clone)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(String),
}

/// How one attempt treats encryption; [`attempts`] lists them for each `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encryption {
    Plain,
    /// TLS where the server offers it, else plain on the same connection.
    IfOffered,
    Required,
}

/// libpq's attempts, in order (PostgreSQL manual, table 34.1); a Unix socket never has TLS.
pub(super) fn attempts(mode: SslMode, address: &Address) -> &'static [Encryption] {
    use Encryption::{IfOffered, Plain, Required};
    match (address, mode) {
        (Address::Unix(_), _) | (Address::Tcp(_), SslMode::Disable) => &[Plain],
        (Address::Tcp(_), SslMode::Allow) => &[Plain, Required],
        (Address::Tcp(_), SslMode::Prefer) => &[IfOffered, Plain],
        (Address::Tcp(_), SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull) => &[Required],
    }
}

/// What the socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Sql,
    /// A receive buffer that makes the walsender's work cheap.
    Replication,
}

/// Receive buffer of a replication stream over a network: large, since the window bounds what a long way can carry. It must
/// be set before connect, when the window's scale is fixed (RFC 7323, section 2.2).
const NETWORK_RECEIVE_BUFFER_BYTES: u32 = 4 * 1024 * 1024;
/// The same on loopback, where a way has no length: as small as it may be, as [`super::gather`] explains. A sender there takes
/// segments of 32 KiB and more, and one that does not fit the window waits for a timer (200 ms), which then sends what fits: with
/// a buffer of 16 KiB a stream crawled at 75 kB a second once its segments had grown.
const LOCAL_RECEIVE_BUFFER_BYTES: u32 = 64 * 1024;
/// A silent peer is probed after this time, then every [`KEEPALIVE_INTERVAL`].
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 6;
/// Sent data that nobody acknowledges for so long means a broken connection.
const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(60);

/// All addresses of a host, in the resolver's order.
pub(super) async fn resolve(host: &HostPort) -> Result<Vec<Address>, Fault> {
    let name = host.hostaddr.as_deref().unwrap_or(&host.host);
    if name.starts_with('/') {
        return Ok(vec![Address::Unix(format!("{name}/.s.PGSQL.{}", host.port))]);
    }
    if let Some(abstract_name) = name.strip_prefix('@') {
        return Ok(vec![Address::Unix(format!("\0{abstract_name}/.s.PGSQL.{}", host.port))]);
    }
    let found = tokio::net::lookup_host((name, host.port)).await;
    let addresses: Vec<_> = found
        .map_err(|error| Fault::new(Code::Unreachable, format!("host name \"{name}\" can't be resolved: {error}")))?
        .map(Address::Tcp)
        .collect();
    if addresses.is_empty() {
        return Err(Fault::new(Code::Unreachable, format!("host name \"{name}\" has no address")));
    }
    Ok(addresses)
}

/// Connects to one address and, as `encryption` says, sets up TLS.
pub(super) async fn dial(
    address: &Address,
    encryption: Encryption,
    plan: &TlsPlan,
    purpose: Purpose,
) -> Result<Dialed, DialError> {
    let network = |error: io::Error| DialError::Network(Fault::new(Code::Unreachable, error.to_string()));
    match address {
        Address::Unix(path) => {
            let stream = UnixStream::connect(path).await.map_err(network)?;
            Ok(Dialed { io: Box::new(stream), tls: false, road: Road::Unix, end_point: None })
        }
        Address::Tcp(address) => {
            let mut stream = connect_tcp(*address, purpose).await.map_err(network)?;
            let road = road(*address);
            if encryption == Encryption::Plain || !ask_for_tls(&mut stream, encryption).await? {
                return Ok(Dialed { io: Box::new(stream), tls: false, road, end_point: None });
            }
            let (stream, end_point) = tls::handshake(plan, stream, *address).await?;
            Ok(Dialed { io: Box::new(stream), tls: true, road, end_point })
        }
    }
}

fn road(address: SocketAddr) -> Road {
    if address.ip().is_loopback() { Road::Loopback } else { Road::Network }
}

async fn connect_tcp(address: SocketAddr, purpose: Purpose) -> io::Result<Socket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if purpose == Purpose::Replication {
        let local = road(address) == Road::Loopback;
        socket.set_recv_buffer_size(if local { LOCAL_RECEIVE_BUFFER_BYTES } else { NETWORK_RECEIVE_BUFFER_BYTES })?;
    }
    let options = SockRef::from(&socket);
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    options.set_tcp_keepalive(&keepalive)?;
    options.set_tcp_user_timeout(Some(UNACKNOWLEDGED_LIMIT))?;
    socket.set_nodelay(true)?;
    socket.connect(address).await.map(Socket)
}

/// SSLRequest and the server's one-byte answer (PostgreSQL manual, section 55.2.10). True when TLS is to follow.
///
/// Nothing past that byte is read here: bytes that somebody injected behind it would reach the TLS layer and break it.
async fn ask_for_tls(stream: &mut Socket, encryption: Encryption) -> Result<bool, DialError> {
    let network = |error: io::Error| DialError::Network(Fault::new(Code::Unreachable, error.to_string()));
    let mut request = bytes::BytesMut::new();
    postgres_protocol::message::frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(network)?;
    match stream.read_u8().await.map_err(network)? {
        b'S' => Ok(true),
        b'N' if encryption == Encryption::IfOffered => Ok(false),
        b'N' => {
            Err(DialError::Tls(Fault::new(Code::BadTls, "the server does not support TLS, but sslmode requires it")))
        }
        // A server that can't even fork answers with an error message, before anything is authenticated.
        b'E' => {
            let what = "the server sent an error instead of starting TLS";
            Err(DialError::Network(Fault::new(Code::ServerBusy, what)))
        }
        _ => Err(DialError::Tls(Fault::new(Code::BadTls, "what answers there does not speak PostgreSQL's protocol"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_follow_libpqs_table() {
        use Encryption::{IfOffered, Plain, Required};
        let tcp = Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 5432)));
        let unix = Address::Unix("/tmp/.s.PGSQL.5432".into());
        for (mode, over_tcp) in [
            (SslMode::Disable, &[Plain][..]),
            (SslMode::Allow, &[Plain, Required]),
            (SslMode::Prefer, &[IfOffered, Plain]),
            (SslMode::Require, &[Required]),
            (SslMode::VerifyCa, &[Required]),
            (SslMode::VerifyFull, &[Required]),
        ] {
            assert_eq!(attempts(mode, &tcp), over_tcp, "{mode:?}");
            assert_eq!(attempts(mode, &unix), [Plain], "{mode:?}");
        }
    }
}

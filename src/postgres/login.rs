//! The login: hosts in order, attempts as `sslmode` says, SCRAM, the pinned settings.
//!
//! As in libpq the next address or host is tried when one can't be reached or can't serve now, never when it refused the
//! login. A password goes out in clear only over TLS, a Unix socket or loopback; as MD5 wherever the server asks for it.

use std::collections::BTreeMap;
use std::io;

use bytes::{Bytes, BytesMut};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, ScramSha256};
use postgres_protocol::message::backend::{AuthenticationSaslBody, ErrorFields, Message};
use postgres_protocol::message::frontend;
use tokio_postgres::fallible_iterator::FallibleIterator;

use super::channel::Channel;
use super::dial::{self, Address, Dialed, Encryption, Io, Purpose};
use super::gather::Road;
use super::sqlstate;
use super::tls::{self, DialError, TlsPlan};
use crate::config::{ChannelBinding, ConnInfo, HostPort, SessionAttrs};
use crate::model::{Code, Fault, Result};

/// Settings of every session, SQL and walsender alike: with these, equal values have equal text, and what one site
/// prints the other reads back as the same value.
pub(super) const PINNED: &[(&str, &str)] = &[
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    ("xmloption", "content"),
    ("array_nulls", "on"),
    ("quote_all_identifiers", "off"),
    ("transform_null_equals", "off"),
    ("search_path", ""),
    ("row_security", "off"),
    ("standard_conforming_strings", "on"),
    ("default_transaction_isolation", "read committed"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("client_min_messages", "warning"),
    ("jit", "off"),
];

/// The oldest version that is supported, as `server_version_num`.
const OLDEST_VERSION: u32 = 150_000;

/// A stream that is logged in and idle.
pub(super) struct Login {
    pub(super) io: Box<dyn Io>,
    /// AuthenticationOk and every message after it up to ReadyForQuery.
    pub(super) greeting: Bytes,
    /// What the server reported about itself (ParameterStatus).
    pub(super) parameters: BTreeMap<String, String>,
    /// `server_version_num`.
    pub(super) version: u32,
    /// Process id of the backend.
    pub(super) backend_pid: u32,
    pub(super) tls: bool,
    pub(super) road: Road,
}

/// Where an attempt failed; that decides what is tried next.
#[derive(Debug)]
enum Failure {
    /// Not reached, or the connection broke: the next address.
    Network(Fault),
    /// TLS did not come about: plain, in sslmode `prefer`.
    Tls(Fault),
    /// The server answered with an error: with the other encryption, in `allow` and `prefer`.
    Refused(Fault),
    /// It can't serve now, or not in the role asked for: the next host.
    Unfit(Fault),
    /// Nothing else can help.
    Final(Fault),
}

impl Failure {
    fn into_fault(self) -> Fault {
        match self {
            Failure::Network(fault)
            | Failure::Tls(fault)
            | Failure::Refused(fault)
            | Failure::Unfit(fault)
            | Failure::Final(fault) => fault,
        }
    }
}

impl From<DialError> for Failure {
    fn from(error: DialError) -> Self {
        match error {
            DialError::Network(fault) => Failure::Network(fault),
            DialError::Tls(fault) => Failure::Tls(fault),
        }
    }
}

impl From<io::Error> for Failure {
    /// In TLS 1.3 the server's verdict on a client certificate arrives as an alert after the handshake.
    fn from(error: io::Error) -> Self {
        match tls::tls_fault(&error) {
            Some(fault) => Failure::Tls(fault),
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                Failure::Network(Fault::new(Code::Unreachable, "the server closed the connection during the login"))
            }
            None => Failure::Network(Fault::new(Code::Unreachable, error.to_string())),
        }
    }
}

/// Logs in at the first host that will do. `extra` are startup parameters beside user, database and the pinned settings.
pub(super) async fn login(info: &ConnInfo, purpose: Purpose, application: &str) -> Result<Login> {
    let application = info.application_name.as_deref().unwrap_or(application);
    let mut faults: Vec<Fault> = Vec::new();
    for host in &info.hosts {
        let place = format!("{}@{}:{}/{}", info.user, host.host, host.port, info.dbname);
        match try_host(info, host, purpose, application).await {
            Ok(login) => return Ok(login),
            Err(Failure::Network(fault) | Failure::Unfit(fault)) => faults.push(fault.at(place)),
            Err(failure) => return Err(failure.into_fault().at(place)),
        }
    }
    let what = faults.iter().map(|fault| fault.what.as_str()).collect::<Vec<_>>().join("; ");
    // A server that is there, but busy, says more than one that is not there.
    let told = faults.iter().find(|fault| fault.code != Code::Unreachable).or(faults.first());
    Err(match told {
        Some(fault) => Fault { what, ..fault.clone() },
        None => Fault::new(Code::Usage, "no host to connect to"),
    })
}

async fn try_host(
    info: &ConnInfo,
    host: &HostPort,
    purpose: Purpose,
    application: &str,
) -> std::result::Result<Login, Failure> {
    let plan = TlsPlan::new(info, &host.host).map_err(Failure::Final)?;
    let mut last = Failure::Network(Fault::new(Code::Unreachable, "no address"));
    for address in dial::resolve(host).await.map_err(Failure::Network)? {
        let attempt = try_address(info, &address, &plan, purpose, application);
        last = match tokio::time::timeout(info.connect_timeout, attempt).await {
            Ok(Ok(login)) => return Ok(login),
            Ok(Err(failure)) => failure,
            Err(_) => {
                let what = format!("no answer within {} s", info.connect_timeout.as_secs());
                Failure::Network(Fault::new(Code::Unreachable, what))
            }
        };
        if !matches!(last, Failure::Network(_)) {
            return Err(last);
        }
    }
    Err(last)
}

/// One address, with each way of encryption that `sslmode` allows.
async fn try_address(
    info: &ConnInfo,
    address: &Address,
    plan: &TlsPlan,
    purpose: Purpose,
    application: &str,
) -> std::result::Result<Login, Failure> {
    let [first, rest @ ..] = dial::attempts(info.sslmode, address) else {
        return Err(Failure::Final(Fault::new(Code::Usage, "no way to connect")));
    };
    let mut over_tls = false;
    let first_try = attempt(info, address, *first, plan, purpose, application, &mut over_tls).await;
    let (Some(second), true) = (rest.first(), should_fall_back(&first_try, *first, over_tls)) else {
        return first_try;
    };
    let second_try = attempt(info, address, *second, plan, purpose, application, &mut over_tls).await;
    match (first_try, second_try) {
        (Err(first_failure), Err(failure)) => Err(told_both(first_failure, failure, *second)),
        (_, outcome) => outcome,
    }
}

/// libpq's rule: `allow` turns to TLS when the server refused a plain login, `prefer` to plain when TLS did not come
/// about or the server refused the login over it.
fn should_fall_back(outcome: &std::result::Result<Login, Failure>, tried: Encryption, over_tls: bool) -> bool {
    match outcome {
        Ok(_) | Err(Failure::Network(_) | Failure::Unfit(_) | Failure::Final(_)) => false,
        Err(Failure::Tls(_)) => true,
        Err(Failure::Refused(_)) => over_tls || tried == Encryption::Plain,
    }
}

/// Both ways failed: the server's verdict on the login counts more than that it has no TLS.
fn told_both(first: Failure, second: Failure, tried: Encryption) -> Failure {
    let how = if tried == Encryption::Plain { "without TLS" } else { "over TLS" };
    match (first, second) {
        (Failure::Refused(first), Failure::Refused(second) | Failure::Tls(second)) if first.what != second.what => {
            Failure::Refused(Fault { what: format!("{}; {how}: {}", first.what, second.what), ..first })
        }
        (Failure::Tls(first), Failure::Refused(second)) => {
            Failure::Refused(Fault { what: format!("{}; {how}: {}", first.what, second.what), ..second })
        }
        (_, second) => second,
    }
}

async fn attempt(
    info: &ConnInfo,
    address: &Address,
    encryption: Encryption,
    plan: &TlsPlan,
    purpose: Purpose,
    application: &str,
    over_tls: &mut bool,
) -> std::result::Result<Login, Failure> {
    let dialed = dial::dial(address, encryption, plan, purpose).await?;
    *over_tls = dialed.tls;
    if info.channel_binding == ChannelBinding::Require && !dialed.tls {
        let what = "channel_binding=require needs TLS, and this connection has none";
        return Err(Failure::Final(Fault::new(Code::BadTls, what)));
    }
    let Dialed { io, tls, road, end_point } = dialed;
    let private = tls || road != Road::Network;
    let mut wire = Wire { channel: Channel::new(io), private, tls, road, end_point };
    wire.start_up(info, purpose, application).await?;
    wire.authenticate(info).await?;
    let login = wire.read_greeting().await?;
    check_server(info, login)
}

fn check_server(info: &ConnInfo, login: Login) -> std::result::Result<Login, Failure> {
    if login.version < OLDEST_VERSION {
        let shown = login.parameters.get("server_version").cloned().unwrap_or_default();
        let what = format!("the server runs PostgreSQL {shown}, older than the oldest supported version, 15");
        return Err(Failure::Final(Fault::new(Code::BadSetting, what).remedy("upgrade the server")));
    }
    let is_on = |name: &str| login.parameters.get(name).is_some_and(|value| value == "on");
    if info.target_session_attrs == SessionAttrs::ReadWrite
        && (is_on("in_hot_standby") || is_on("default_transaction_read_only"))
    {
        let what = "the server accepts no writes, and target_session_attrs=read-write";
        return Err(Failure::Unfit(Fault::new(Code::ServerBusy, what)));
    }
    Ok(login)
}

/// Messages over a stream that is not logged in yet.
struct Wire {
    channel: Channel,
    /// Nobody on a network can listen: TLS, a Unix socket or loopback.
    private: bool,
    tls: bool,
    road: Road,
    end_point: Option<Vec<u8>>,
}

type Step<T> = std::result::Result<T, Failure>;

fn unexpected() -> Failure {
    Failure::Final(Fault::new(Code::BadCredentials, "the server answered the login with a message that does not fit"))
}

fn refused(words: impl Into<String>) -> Failure {
    Failure::Final(Fault::new(Code::BadCredentials, words))
}

impl Wire {
    async fn send(&mut self, message: &[u8]) -> Step<()> {
        Ok(self.channel.send(message).await?)
    }

    /// The next message as raw bytes and parsed; an error of the server becomes a failure.
    async fn next(&mut self) -> Step<(Bytes, Message)> {
        let raw = self.channel.next().await?;
        let message = Message::parse(&mut BytesMut::from(&raw[..]))?.ok_or_else(unexpected)?;
        match &message {
            Message::ErrorResponse(body) => Err(server_failure(&mut body.fields())),
            _ => Ok((raw, message)),
        }
    }

    async fn start_up(&mut self, info: &ConnInfo, purpose: Purpose, application: &str) -> Step<()> {
        let identity = [
            ("user", info.user.as_str()),
            ("database", info.dbname.as_str()),
            ("application_name", application),
            ("replication", "database"),
        ];
        let identity = match purpose {
            Purpose::Replication => &identity[..],
            Purpose::Sql => &identity[..3],
        };
        let mut message = BytesMut::new();
        frontend::startup_message(identity.iter().chain(PINNED).copied(), &mut message)?;
        self.send(&message).await
    }

    async fn authenticate(&mut self, info: &ConnInfo) -> Step<()> {
        let needs_binding = info.channel_binding == ChannelBinding::Require;
        let without_binding =
            || refused("the server did not ask for SCRAM with channel binding, and channel_binding=require");
        match self.next().await?.1 {
            Message::AuthenticationSasl(body) => self.scram(info, &body).await?,
            _ if needs_binding => return Err(without_binding()),
            Message::AuthenticationOk => return Ok(()),
            Message::AuthenticationCleartextPassword if !self.private => {
                let what = "the server asks for the password in clear, and the connection is not encrypted";
                return Err(Failure::Final(
                    Fault::new(Code::BadCredentials, what)
                        .remedy("use sslmode=require, or scram-sha-256 in pg_hba.conf"),
                ));
            }
            Message::AuthenticationCleartextPassword => self.send_password(password(info)?).await?,
            Message::AuthenticationMd5Password(body) => {
                let hash = md5_hash(info.user.as_bytes(), password(info)?, body.salt());
                self.send_password(hash.as_bytes()).await?;
            }
            Message::AuthenticationGss | Message::AuthenticationSspi | Message::AuthenticationKerberosV5 => {
                return Err(refused("the server asks for GSSAPI, SSPI or Kerberos, which are not supported"));
            }
            _ => return Err(unexpected()),
        }
        match self.next().await?.1 {
            Message::AuthenticationOk => Ok(()),
            _ => Err(unexpected()),
        }
    }

    async fn send_password(&mut self, password: &[u8]) -> Step<()> {
        let mut message = BytesMut::new();
        frontend::password_message(password, &mut message)?;
        self.send(&message).await
    }

    /// SCRAM-SHA-256, bound to the TLS channel where both sides can (PostgreSQL manual, section 55.3.1).
    async fn scram(&mut self, info: &ConnInfo, offer: &AuthenticationSaslBody) -> Step<()> {
        let offered: Vec<&str> = offer.mechanisms().collect()?;
        let may_bind = info.channel_binding != ChannelBinding::Disable;
        let end_point = self.end_point.take().filter(|_| may_bind);
        let (binding, mechanism) = match end_point {
            Some(hash) if offered.contains(&sasl::SCRAM_SHA_256_PLUS) => {
                (sasl::ChannelBinding::tls_server_end_point(hash), sasl::SCRAM_SHA_256_PLUS)
            }
            _ if info.channel_binding == ChannelBinding::Require => {
                return Err(refused("the server does not offer channel binding, and channel_binding=require"));
            }
            // "I could, but you don't offer it": a server that did offer it then knows that somebody is between.
            Some(_) => (sasl::ChannelBinding::unrequested(), sasl::SCRAM_SHA_256),
            None => (sasl::ChannelBinding::unsupported(), sasl::SCRAM_SHA_256),
        };
        if !offered.contains(&mechanism) {
            return Err(refused("the server offers no SASL mechanism but unknown ones"));
        }
        let impostor = |error: io::Error| refused(format!("SCRAM: the server does not know the password: {error}"));
        let mut scram = ScramSha256::new(password(info)?, binding);
        let mut message = BytesMut::new();
        frontend::sasl_initial_response(mechanism, scram.message(), &mut message)?;
        self.send(&message).await?;
        let Message::AuthenticationSaslContinue(challenge) = self.next().await?.1 else { return Err(unexpected()) };
        scram.update(challenge.data()).map_err(impostor)?;
        message.clear();
        frontend::sasl_response(scram.message(), &mut message)?;
        self.send(&message).await?;
        let Message::AuthenticationSaslFinal(proof) = self.next().await?.1 else { return Err(unexpected()) };
        scram.finish(proof.data()).map_err(impostor)
    }

    /// From AuthenticationOk to ReadyForQuery.
    async fn read_greeting(mut self) -> Step<Login> {
        let mut greeting = BytesMut::from(&b"R\0\0\0\x08\0\0\0\0"[..]);
        let mut parameters = BTreeMap::new();
        let mut backend_pid = 0;
        loop {
            let (raw, message) = self.next().await?;
            greeting.extend_from_slice(&raw);
            match message {
                Message::ParameterStatus(body) => {
                    parameters.insert(body.name()?.to_owned(), body.value()?.to_owned());
                }
                Message::BackendKeyData(body) => backend_pid = body.process_id().unsigned_abs(),
                Message::NoticeResponse(_) => {}
                Message::ReadyForQuery(_) => break,
                _ => return Err(unexpected()),
            }
        }
        let version = parameters.get("server_version").map_or(0, |text| version_number(text));
        let Wire { channel, tls, road, .. } = self;
        Ok(Login { io: channel.io, greeting: greeting.freeze(), parameters, version, backend_pid, tls, road })
    }
}

fn password(info: &ConnInfo) -> Step<&[u8]> {
    let missing = || {
        let fault = Fault::new(Code::BadCredentials, "the server asks for a password and none is given");
        Failure::Final(fault.remedy("set password_file for this site"))
    };
    Ok(info.password.as_ref().ok_or_else(missing)?.reveal().as_bytes())
}

/// An ErrorResponse before the session is ready.
fn server_failure(fields: &mut ErrorFields<'_>) -> Failure {
    let (state, message) = error_fields(fields);
    let fault = sqlstate::server_fault(&state, &message);
    if fault.is_transient() { Failure::Unfit(fault) } else { Failure::Refused(fault) }
}

/// SQLSTATE and primary message of an ErrorResponse or NoticeResponse (PostgreSQL manual, section 55.8).
pub(super) fn error_fields(fields: &mut ErrorFields<'_>) -> (String, String) {
    let (mut state, mut message) = (String::new(), String::new());
    while let Ok(Some(field)) = fields.next() {
        match field.type_() {
            b'C' => state = String::from_utf8_lossy(field.value_bytes()).into_owned(),
            b'M' => message = String::from_utf8_lossy(field.value_bytes()).into_owned(),
            _ => {}
        }
    }
    (state, message)
}

/// `server_version_num` from `server_version`: `15.18 (Debian …)` is 150018, `19beta1` is 190000.
fn version_number(text: &str) -> u32 {
    let number = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text[..end].parse::<u32>().unwrap_or(0)
    };
    let minor = text.split_once('.').map_or(0, |(_, minor)| number(minor));
    number(text).saturating_mul(10_000).saturating_add(minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers() {
        for (text, number) in
            [("15.18 (Debian 15.18-0+deb12u1)", 150_018), ("18.4", 180_004), ("19beta1", 190_000), ("", 0), ("x.y", 0)]
        {
            assert_eq!(version_number(text), number, "{text}");
        }
    }

    #[test]
    fn falls_back_as_libpq_does() {
        let fault = || Fault::new(Code::BadTls, "x");
        let check = |failure: Failure, tried, over_tls, expected| {
            let shown = format!("{failure:?} {tried:?} {over_tls}");
            assert_eq!(should_fall_back(&Err(failure), tried, over_tls), expected, "{shown}");
        };
        check(Failure::Refused(fault()), Encryption::Plain, false, true);
        check(Failure::Refused(fault()), Encryption::IfOffered, true, true);
        check(Failure::Refused(fault()), Encryption::IfOffered, false, false);
        check(Failure::Tls(fault()), Encryption::IfOffered, false, true);
        check(Failure::Network(fault()), Encryption::IfOffered, false, false);
        check(Failure::Unfit(fault()), Encryption::IfOffered, true, false);
        check(Failure::Final(fault()), Encryption::IfOffered, true, false);
    }
}

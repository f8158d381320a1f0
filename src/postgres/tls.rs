//! TLS as libpq does it (PostgreSQL manual, section 34.19), on rustls.
//!
//! Known differences: certificate revocation lists are not read; a root certificate file that is named but missing is an
//! error in every mode, not only in verify-ca and verify-full; TLS 1.2 is the oldest version.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256, Sha384, Sha512};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::socket::Socket;
use super::{chain, server_name};
use crate::config::{ConnInfo, SslMode};
use crate::model::{Code, Fault, Result};

/// Why a stream did not come about.
#[derive(Debug)]
pub(super) enum DialError {
    /// The address can't be reached, or the connection broke.
    Network(Fault),
    /// The server has no TLS, or the handshake failed.
    Tls(Fault),
}

/// What the handshake needs, read once for a connection attempt over all hosts.
pub(super) struct TlsPlan {
    roots: Option<Roots>,
    check_name: bool,
    client: Option<ClientCertificate>,
    host: String,
}

#[derive(Clone)]
struct Roots {
    /// Where they are from, for messages.
    place: String,
    certificates: Vec<CertificateDer<'static>>,
}

struct ClientCertificate {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl TlsPlan {
    /// Reads the files that `info` names, or libpq's default ones, for a connection to `host`.
    pub(super) fn new(info: &ConnInfo, host: &str) -> Result<TlsPlan> {
        let verifies = matches!(info.sslmode, SslMode::VerifyCa | SslMode::VerifyFull);
        let none = TlsPlan { roots: None, check_name: false, client: None, host: host.to_owned() };
        if info.sslmode == SslMode::Disable || host.starts_with(['/', '@']) {
            return Ok(none);
        }
        let roots = read_roots(info.sslrootcert.as_deref())?;
        if verifies && roots.is_none() {
            let what = format!("no root certificates: {} does not exist", default_file("root.crt").display());
            return Err(Fault::new(Code::BadTls, what)
                .remedy("provide the file, name one by sslrootcert, or use sslrootcert=system"));
        }
        let client = read_client_certificate(info)?;
        Ok(TlsPlan { roots, check_name: info.sslmode == SslMode::VerifyFull, client, ..none })
    }

    fn config(&self) -> std::result::Result<ClientConfig, rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Verifier {
            provider: Arc::clone(&provider),
            roots: self.roots.clone(),
            name: self.check_name.then(|| self.host.clone()),
        };
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        match &self.client {
            None => Ok(config.with_no_client_auth()),
            Some(client) => config.with_client_auth_cert(client.chain.clone(), client.key.clone_key()),
        }
    }
}

/// The handshake, and the certificate's hash for channel binding.
pub(super) async fn handshake(
    plan: &TlsPlan,
    stream: Socket,
    address: SocketAddr,
) -> std::result::Result<(TlsStream<Socket>, Option<Vec<u8>>), DialError> {
    let config = plan.config().map_err(|error| {
        DialError::Tls(Fault::new(Code::BadSecret, format!("client certificate can't be used: {error}")))
    })?;
    // Sent as SNI when it is a name; who is trusted is the verifier's business.
    let name = ServerName::try_from(plan.host.clone()).unwrap_or_else(|_| ServerName::from(address.ip()));
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|error| {
        tls_fault(&error).map_or_else(
            || DialError::Network(Fault::new(Code::Unreachable, format!("TLS handshake: {error}"))),
            DialError::Tls,
        )
    })?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let end_point = certificate.and_then(|certificate| end_point_hash(certificate));
    Ok((stream, end_point))
}

/// The TLS fault inside an I/O error, worded for an operator; `None` when the connection merely broke.
pub(super) fn tls_fault(error: &io::Error) -> Option<Fault> {
    use rustls::Error as Tls;
    let words = match error.get_ref()?.downcast_ref::<Tls>()? {
        Tls::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "the server's certificate has expired".to_owned()
        }
        Tls::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
            "the server's certificate is not valid yet; check the clocks".to_owned()
        }
        Tls::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "the server's certificate is signed by an unknown authority".to_owned()
        }
        Tls::InvalidCertificate(CertificateError::Other(other)) => other.to_string(),
        Tls::AlertReceived(alert) => format!("the server refused the TLS connection: {alert:?}"),
        other => other.to_string(),
    };
    Some(Fault::new(Code::BadTls, words))
}

/// Hash for `tls-server-end-point`: that of the certificate's signature algorithm, SHA-256 in place of MD5 and SHA-1
/// (RFC 5929, section 4.1). `None` where the algorithm has no single hash (Ed25519): then there is no channel binding.
fn end_point_hash(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let parsed = Certificate::from_der(certificate).ok()?;
    match parsed.signature_algorithm.oid.to_string().as_str() {
        // md5, sha1 and sha256 WithRSAEncryption; ecdsa-with-SHA1 and -SHA256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => Some(Sha256::digest(certificate).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Some(Sha384::digest(certificate).to_vec()),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Some(Sha512::digest(certificate).to_vec()),
        _ => None,
    }
}

/// A file in libpq's directory of the user.
fn default_file(name: &str) -> PathBuf {
    let home = std::env::var_os("HOME").unwrap_or_else(|| "/".into());
    Path::new(&home).join(".postgresql").join(name)
}

fn bad_file(path: &Path, words: impl std::fmt::Display) -> Fault {
    Fault::new(Code::BadSecret, format!("{}: {words}", path.display()))
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(|items| items.collect())
        .map_err(|error| bad_file(path, format!("not readable as PEM certificates: {error}")))?;
    if certificates.is_empty() { Err(bad_file(path, "holds no PEM certificate")) } else { Ok(certificates) }
}

fn read_roots(named: Option<&str>) -> Result<Option<Roots>> {
    if named == Some("system") {
        let found = rustls_native_certs::load_native_certs();
        if found.certs.is_empty() {
            return Err(Fault::new(Code::BadTls, "sslrootcert=system: this machine has no root certificates")
                .remedy("install the package ca-certificates, or name a file by sslrootcert"));
        }
        return Ok(Some(Roots { place: "the system's roots".into(), certificates: found.certs }));
    }
    let path = named.map_or_else(|| default_file("root.crt"), PathBuf::from);
    if named.is_none() && !path.exists() {
        return Ok(None);
    }
    let certificates = read_certificates(&path)?;
    Ok(Some(Roots { place: path.display().to_string(), certificates }))
}

fn read_client_certificate(info: &ConnInfo) -> Result<Option<ClientCertificate>> {
    let certificate = info.sslcert.clone().unwrap_or_else(|| default_file("postgresql.crt"));
    if info.sslcert.is_none() && !certificate.exists() {
        return Ok(None);
    }
    let chain = read_certificates(&certificate)?;
    let path = info.sslkey.clone().unwrap_or_else(|| default_file("postgresql.key"));
    check_key_mode(&path)?;
    let key = PrivateKeyDer::from_pem_file(&path)
        .map_err(|error| bad_file(&path, format!("not readable as an unencrypted PEM key: {error}")))?;
    Ok(Some(ClientCertificate { chain, key }))
}

/// libpq's rule: 0600 or stricter for the user's own key, 0640 or stricter for one of root's.
fn check_key_mode(path: &Path) -> Result<()> {
    let meta = fs::metadata(path).map_err(|error| bad_file(path, error))?;
    let forbidden = if meta.uid() == 0 { 0o027 } else { 0o077 };
    if meta.mode() & forbidden != 0 {
        let words = "the private key can be read by others";
        return Err(bad_file(path, words).remedy("chmod 0600 (or 0640 when root owns it)"));
    }
    Ok(())
}

/// libpq's checks: none without roots; with roots the chain; in verify-full the name too.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    roots: Option<Roots>,
    name: Option<String>,
}

impl std::fmt::Debug for Roots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {}", self.certificates.len(), self.place)
    }
}

fn other(words: String) -> rustls::Error {
    let error: Box<dyn std::error::Error + Send + Sync> = words.into();
    rustls::Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(Arc::from(error))))
}

impl Verifier {
    fn check_name(&self, end_entity: &CertificateDer<'_>) -> std::result::Result<(), rustls::Error> {
        let Some(host) = &self.name else { return Ok(()) };
        let certificate = chain::parse(end_entity)?;
        server_name::check(&certificate, host).map_err(|names| {
            let held = if names.is_empty() { "no name".to_owned() } else { names.join(", ") };
            other(format!("the server's certificate is for {held}, not for host name \"{host}\""))
        })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let Some(roots) = &self.roots else { return Ok(ServerCertVerified::assertion()) };
        let algorithms = &self.provider.signature_verification_algorithms;
        if chain::needs_own_rules(&chain::parse(end_entity)?) {
            chain::verify(end_entity, intermediates, &roots.certificates, now, algorithms)?;
        } else {
            let mut store = RootCertStore::empty();
            store.add_parsable_certificates(roots.certificates.iter().cloned());
            let parsed = ParsedCertificate::try_from(end_entity)?;
            verify_server_cert_signed_by_trust_anchor(&parsed, &store, intermediates, now, algorithms.all)?;
        }
        self.check_name(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        if chain::is_version_1(&chain::parse(cert)?) {
            return chain::verify_handshake(message, cert, signed, algorithms);
        }
        verify_tls12_signature(message, cert, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        if chain::is_version_1(&chain::parse(cert)?) {
            return chain::verify_handshake(message, cert, signed, algorithms);
        }
        verify_tls13_signature(message, cert, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

//! TLS between nodes, from the files that a pipeline names.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::config::Tls;
use crate::model::{Code, Fault, Result};

/// The only protocol spoken.
const ALPN: &[u8] = b"http/1.1";

/// What a node shows and checks when it dials a peer: its own certificate, and the authority of its own file or, where it
/// names none, of the peer's; the system's authorities where neither does.
///
/// # Errors
/// `BadSecret` for a file that can't be used.
pub fn client(own: &Tls, peer: &Tls) -> Result<Arc<ClientConfig>> {
    let roots = match own.ca.as_deref().or(peer.ca.as_deref()) {
        Some(path) => roots(path)?,
        None => system_roots()?,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| unusable(&error))?.with_root_certificates(roots);
    let mut config = match (&own.cert, &own.key) {
        (Some(cert), Some(key)) => builder
            .with_client_auth_cert(certificates(cert)?, private_key(key)?)
            .map_err(|error| bad_file(cert, &error))?,
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// What a node shows and checks at its `listen`; `None` where it has no certificate.
///
/// A client without a certificate gets through the handshake even where there is a `ca`: health is open to all, and who
/// asks for more is refused by the request's own check.
///
/// # Errors
/// `BadSecret` for a file that can't be used.
pub fn server(own: &Tls) -> Result<Option<Arc<ServerConfig>>> {
    let (Some(cert), Some(key)) = (&own.cert, &own.key) else { return Ok(None) };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| unusable(&error))?;
    let builder = match &own.ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)?), provider);
            let verifier = verifier.allow_unauthenticated().build().map_err(|error| bad_file(ca, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let config = builder.with_single_cert(certificates(cert)?, private_key(key)?);
    let mut config = config.map_err(|error| bad_file(cert, &error))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Some(Arc::new(config)))
}

fn roots(path: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| bad_file(path, &error))?;
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let fault = Fault::new(Code::BadTls, "this machine has no root certificates to check a peer's certificate by");
        return Err(fault.remedy("install the package ca-certificates, or name a file by tls.ca"));
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(|items| items.collect::<std::result::Result<Vec<_>, _>>());
    let certificates = read.map_err(|error| bad_file(path, &error))?;
    if certificates.is_empty() { Err(bad_file(path, &"holds no PEM certificate")) } else { Ok(certificates) }
}

/// A key that others may read is no secret; the rule is that of password files.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let meta = fs::metadata(path).map_err(|error| bad_file(path, &error))?;
    let forbidden = if meta.uid() == 0 { 0o037 } else { 0o077 };
    if meta.mode() & forbidden != 0 {
        let fault = bad_file(path, &"the private key can be read by others");
        return Err(fault.remedy("chmod 0600 (or 0640 when root owns it)"));
    }
    PrivateKeyDer::from_pem_file(path).map_err(|error| bad_file(path, &error))
}

fn bad_file(path: &Path, error: &dyn std::fmt::Display) -> Fault {
    Fault::new(Code::BadSecret, format!("{}: {error}", path.display()))
}

fn unusable(error: &rustls::Error) -> Fault {
    Fault::new(Code::BadTls, format!("TLS can't be set up: {error}"))
}

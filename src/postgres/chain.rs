//! Certificate chains that OpenSSL accepts and webpki refuses.
//!
//! The PostgreSQL manual's own recipe (section 19.9.5) makes two such kinds: a self-signed server certificate, which is
//! marked as an authority, trusted by being its own root; and one signed by `openssl x509 -req`, which is X.509
//! version 1. Only certificates of these kinds come here; all others are webpki's. The rules are those of RFC 5280,
//! section 6, without policies, and a chain with name constraints is refused.

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error};
use x509_cert::Certificate;
use x509_cert::certificate::Version;
use x509_cert::der::{Decode, Encode, Reader, SliceReader};
use x509_cert::ext::pkix::{BasicConstraints, ExtendedKeyUsage, KeyUsage, NameConstraints};
use x509_cert::spki::AlgorithmIdentifierOwned;

/// Longest chain, the root not counted.
const MAX_DEPTH: usize = 8;
/// `id-kp-serverAuth` and `anyExtendedKeyUsage`.
const SERVER_USAGES: [&str; 2] = ["1.3.6.1.5.5.7.3.1", "2.5.29.37.0"];

/// The certificate's structure.
pub(super) fn parse(der: &CertificateDer<'_>) -> Result<Certificate, Error> {
    Certificate::from_der(der).map_err(|_| CertificateError::BadEncoding.into())
}

/// True for X.509 version 1.
pub(super) fn is_version_1(certificate: &Certificate) -> bool {
    certificate.tbs_certificate.version == Version::V1
}

/// True for a server certificate of version 1, or one that is marked as an authority.
pub(super) fn needs_own_rules(certificate: &Certificate) -> bool {
    is_version_1(certificate) || constraints(certificate).is_some_and(|constraints| constraints.ca)
}

fn constraints(certificate: &Certificate) -> Option<BasicConstraints> {
    certificate.tbs_certificate.get::<BasicConstraints>().ok().flatten().map(|(_, constraints)| constraints)
}

/// One certificate, as bytes and as structure.
struct Link<'a> {
    der: &'a [u8],
    parsed: Certificate,
}

impl<'a> Link<'a> {
    fn new(der: &'a CertificateDer<'_>) -> Result<Self, Error> {
        Ok(Self { der, parsed: parse(der)? })
    }

    fn check_validity(&self, now: UnixTime) -> Result<(), Error> {
        let validity = &self.parsed.tbs_certificate.validity;
        if now.as_secs() > validity.not_after.to_unix_duration().as_secs() {
            return Err(CertificateError::Expired.into());
        }
        if now.as_secs() < validity.not_before.to_unix_duration().as_secs() {
            return Err(CertificateError::NotValidYet.into());
        }
        Ok(())
    }

    /// May this certificate sign others, `below` of them that are authorities themselves?
    fn is_authority(&self, below: usize) -> bool {
        let body = &self.parsed.tbs_certificate;
        let may_sign = match body.get::<KeyUsage>() {
            Ok(usage) => usage.is_none_or(|(_, usage)| usage.key_cert_sign()),
            Err(_) => false,
        };
        let long_enough = |limit: Option<u8>| limit.is_none_or(|limit| below <= usize::from(limit));
        may_sign && constraints(&self.parsed).is_some_and(|found| found.ca && long_enough(found.path_len_constraint))
    }

    /// Is this certificate signed with `issuer`'s key?
    fn is_signed_by(&self, issuer: &Link<'_>, algorithms: &WebPkiSupportedAlgorithms) -> bool {
        self.parsed.tbs_certificate.issuer == issuer.parsed.tbs_certificate.subject
            && self.signature_holds(issuer, algorithms).unwrap_or(false)
    }

    fn signature_holds(
        &self,
        issuer: &Link<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> x509_cert::der::Result<bool> {
        let message = signed_bytes(self.der)?;
        let signature_id = content(&self.parsed.signature_algorithm)?;
        let key = &issuer.parsed.tbs_certificate.subject_public_key_info;
        let key_id = content(&key.algorithm)?;
        let fitting = algorithms.all.iter().filter(|algorithm| {
            algorithm.signature_alg_id().as_ref() == signature_id && algorithm.public_key_alg_id().as_ref() == key_id
        });
        let signature = self.parsed.signature.raw_bytes();
        let key = key.subject_public_key.raw_bytes();
        Ok(fitting.into_iter().any(|algorithm| algorithm.verify_signature(key, message, signature).is_ok()))
    }
}

/// The bytes of the TBSCertificate, as they were signed.
fn signed_bytes(der: &[u8]) -> x509_cert::der::Result<&[u8]> {
    let mut outer = SliceReader::new(der)?;
    x509_cert::der::Header::decode(&mut outer)?;
    outer.tlv_bytes()
}

/// The content of an AlgorithmIdentifier, without tag and length, as `rustls::pki_types` has it.
fn content(algorithm: &AlgorithmIdentifierOwned) -> x509_cert::der::Result<Vec<u8>> {
    let der = algorithm.to_der()?;
    let mut reader = SliceReader::new(&der)?;
    let header = x509_cert::der::Header::decode(&mut reader)?;
    reader.read_vec(header.length)
}

/// Walks from the server's certificate to a root.
///
/// # Errors
/// `UnknownIssuer` when no root is reached; `Expired`, `NotValidYet` and so on for a link that may not be used.
pub(super) fn verify(
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
    now: UnixTime,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<(), Error> {
    let roots: Vec<Link<'_>> = roots.iter().filter_map(|root| Link::new(root).ok()).collect();
    let intermediates: Vec<Link<'_>> = intermediates.iter().map(Link::new).collect::<Result<_, _>>()?;
    let leaf = Link::new(end_entity)?;
    check_server_usage(&leaf.parsed)?;
    let mut current = &leaf;
    for depth in 0..MAX_DEPTH {
        current.check_validity(now)?;
        if current.parsed.tbs_certificate.get::<NameConstraints>().ok().flatten().is_some() {
            return Err(CertificateError::UnhandledCriticalExtension.into());
        }
        if let Some(root) = roots.iter().find(|root| {
            let is_itself = root.der == current.der && current.is_signed_by(root, algorithms);
            // A root of version 1 has no constraints to read; being in the root file is what makes it an authority.
            let may_sign = is_version_1(&root.parsed) || root.is_authority(depth);
            is_itself || (may_sign && current.is_signed_by(root, algorithms))
        }) {
            return root.check_validity(now);
        }
        let issuer =
            intermediates.iter().find(|link| link.is_authority(depth) && current.is_signed_by(link, algorithms));
        current = issuer.ok_or(CertificateError::UnknownIssuer)?;
    }
    Err(CertificateError::UnknownIssuer.into())
}

fn check_server_usage(certificate: &Certificate) -> Result<(), Error> {
    match certificate.tbs_certificate.get::<ExtendedKeyUsage>() {
        Ok(None) => Ok(()),
        Ok(Some((_, usage)))
            if usage.0.iter().any(|oid| SERVER_USAGES.iter().any(|allowed| oid.to_string() == **allowed)) =>
        {
            Ok(())
        }
        Ok(Some(_)) => Err(CertificateError::InvalidPurpose.into()),
        Err(_) => Err(CertificateError::BadEncoding.into()),
    }
}

/// Checks the handshake's signature with the key of a version 1 certificate.
pub(super) fn verify_handshake(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<HandshakeSignatureValid, Error> {
    let bad = || Error::from(CertificateError::BadSignature);
    let parsed = parse(certificate)?;
    let key = &parsed.tbs_certificate.subject_public_key_info;
    let key_id = content(&key.algorithm).map_err(|_| bad())?;
    let key = key.subject_public_key.raw_bytes();
    let fitting = algorithms.mapping.iter().filter(|(scheme, _)| *scheme == signed.scheme).flat_map(|(_, all)| *all);
    fitting
        .filter(|algorithm| algorithm.public_key_alg_id().as_ref() == key_id)
        .find(|algorithm| algorithm.verify_signature(key, message, signed.signature()).is_ok())
        .map(|_| HandshakeSignatureValid::assertion())
        .ok_or_else(bad)
}

//! Does a certificate name the host? As libpq decides it for `verify-full` (PostgreSQL manual, section 34.19.1).

use std::net::IpAddr;

use x509_cert::Certificate;
use x509_cert::der::asn1::{PrintableStringRef, TeletexStringRef, Utf8StringRef};
use x509_cert::der::oid::db::rfc4519::COMMON_NAME;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// `Ok` when `certificate` names `host`, else the names it holds.
///
/// Subject alternative names first; the common name counts only when there is no alternative name of the host's kind
/// (DNS or IP). A wildcard stands for exactly one leftmost label.
pub(super) fn check(certificate: &Certificate, host: &str) -> Result<(), Vec<String>> {
    let host_ip: Option<IpAddr> = host.parse().ok();
    let mut presented = Vec::new();
    let mut may_use_common_name = true;
    let alternatives = certificate.tbs_certificate.get::<SubjectAltName>().ok().flatten();
    for name in alternatives.into_iter().flat_map(|(_, names)| names.0) {
        match name {
            GeneralName::DnsName(dns) => {
                may_use_common_name &= host_ip.is_some();
                if dns_matches(dns.as_str(), host) {
                    return Ok(());
                }
                presented.push(dns.as_str().to_owned());
            }
            GeneralName::IpAddress(octets) => {
                may_use_common_name &= host_ip.is_none();
                let Some(ip) = ip_of(octets.as_bytes()) else { continue };
                if host_ip == Some(ip) {
                    return Ok(());
                }
                presented.push(ip.to_string());
            }
            _ => {}
        }
    }
    if may_use_common_name && let Some(name) = common_name(certificate) {
        if dns_matches(&name, host) {
            return Ok(());
        }
        presented.push(name);
    }
    Err(presented)
}

fn ip_of(octets: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(octets) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(octets).ok().map(IpAddr::from)
}

fn common_name(certificate: &Certificate) -> Option<String> {
    let names = &certificate.tbs_certificate.subject.0;
    let common = names.iter().flat_map(|name| name.0.iter()).find(|attribute| attribute.oid == COMMON_NAME)?;
    let value = &common.value;
    if let Ok(text) = value.decode_as::<Utf8StringRef<'_>>() {
        return Some(text.as_str().to_owned());
    }
    if let Ok(text) = value.decode_as::<PrintableStringRef<'_>>() {
        return Some(text.as_str().to_owned());
    }
    value.decode_as::<TeletexStringRef<'_>>().ok().map(|text| text.as_str().to_owned())
}

/// A name with an embedded zero byte never matches (CVE-2009-4034).
fn dns_matches(pattern: &str, host: &str) -> bool {
    if pattern.contains('\0') {
        return false;
    }
    if pattern.eq_ignore_ascii_case(host) {
        return true;
    }
    let Some(suffix) = pattern.strip_prefix('*').filter(|suffix| suffix.starts_with('.') && suffix.len() > 1) else {
        return false;
    };
    let Some(dot) = host.find('.') else { return false };
    dot > 0 && host[dot..].eq_ignore_ascii_case(suffix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};
    use x509_cert::der::Decode;

    fn certificate(common: &str, names: &[&str]) -> Certificate {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, common);
        for name in names {
            params.subject_alt_names.push(match name.parse() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName((*name).try_into().expect("ASCII")),
            });
        }
        let made = params.self_signed(&KeyPair::generate().expect("key")).expect("certificate");
        Certificate::from_der(made.der()).expect("DER")
    }

    #[test]
    fn names_match_as_in_libpq() {
        for (common, names, host, ok) in [
            ("db.example", &[][..], "db.example", true),
            ("DB.example", &[], "db.EXAMPLE", true),
            ("*.example", &[], "db.example", true),
            ("*.example", &[], "a.db.example", false),
            ("*.example", &[], ".example", false),
            ("*.example", &[], "example", false),
            ("*example", &[], "dbexample", false),
            ("db*.example", &[], "db1.example", false),
            ("*", &[], "db", false),
            ("db.example", &["other.example"], "db.example", false),
            ("x", &["a.example", "b.example"], "b.example", true),
            ("x", &["127.0.0.1"], "127.0.0.1", true),
            ("x", &["::1"], "0:0::1", true),
            ("x", &["127.0.0.1"], "127.0.0.2", false),
            ("127.0.0.1", &[], "127.0.0.1", true),
            ("127.0.0.1", &["a.example"], "127.0.0.1", true),
            ("127.0.0.1", &["127.0.0.2"], "127.0.0.1", false),
            ("db.example", &["127.0.0.2"], "db.example", true),
        ] {
            assert_eq!(check(&certificate(common, names), host).is_ok(), ok, "CN {common}, {names:?}, host {host}");
        }
    }

    #[test]
    fn the_names_it_holds_are_told() {
        assert_eq!(check(&certificate("c", &["a", "10.0.0.1"]), "h"), Err(vec!["a".into(), "10.0.0.1".into()]));
        assert_eq!(check(&certificate("c", &[]), "h"), Err(vec!["c".into()]));
    }
}

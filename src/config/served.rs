//! What a site serves and how it is dialled: `listen`, `url`, `tls`, `token_file`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::pipeline::{Dial, MetricsAccess, Site, Tls, TopicKind};
use super::source::Source;
use crate::model::FlowName;

/// The keys of a site that are about serving.
pub(super) struct Served {
    pub(super) listen: Option<SocketAddr>,
    pub(super) url: Option<String>,
    pub(super) tls: Tls,
    pub(super) token_file: Option<PathBuf>,
    pub(super) insecure_listen: bool,
    pub(super) metrics: MetricsAccess,
}

/// Reads them; nothing goes over a network unencrypted unless the file says so.
pub(super) fn served(source: &mut Source, site: &str) -> Option<Served> {
    let at = |key: &str| format!("site.{site}.{key}");
    let listen = listen(source, &at("listen"));
    let url = source.text(&at("url")).and_then(|url| checked_url(source, &at("url"), &url));
    let tls =
        Tls { cert: source.path(&at("tls.cert")), key: source.path(&at("tls.key")), ca: source.path(&at("tls.ca")) };
    if tls.cert.is_some() != tls.key.is_some() {
        source.problem(&at("tls"), "a certificate and its key go together", "give tls.cert and tls.key");
    }
    let token_file = source.path(&at("token_file"));
    let insecure_listen = source.flag(&at("insecure_listen"))?;
    let words = [
        ("local", MetricsAccess::Local),
        ("open", MetricsAccess::Open),
        ("authenticated", MetricsAccess::Authenticated),
    ];
    let metrics = source.choice(&at("metrics"), &words)?;
    let remedy = "give tls.cert and tls.key, or accept the risk by insecure_listen = true";
    if let Some(address) = listen
        && !address.ip().is_loopback()
        && tls.cert.is_none()
        && !insecure_listen
    {
        source.problem(&at("listen"), format!("{address} is no loopback address, and there is no TLS"), remedy);
    }
    if let Some(url) = &url
        && url.starts_with("http://")
        && !leads_home(url)
        && !insecure_listen
    {
        let what = format!("{url} sends rows and token unencrypted");
        source.problem(&at("url"), what, "write https://, or accept the risk by insecure_listen = true");
    }
    Some(Served { listen, url, tls, token_file, insecure_listen, metrics })
}

fn listen(source: &mut Source, path: &str) -> Option<SocketAddr> {
    let text = source.text(path)?;
    let address = text.parse().ok();
    if address.is_none() {
        let what = format!("\"{text}\" is no address to listen at");
        source.problem(path, what, "write ADDRESS:PORT, as 127.0.0.1:7800");
    }
    address
}

fn checked_url(source: &mut Source, path: &str, url: &str) -> Option<String> {
    let url = url.trim_end_matches('/');
    if authority(url).is_none() {
        source.problem(path, "a peer is dialled by http or https", "write https://HOST:PORT");
        return None;
    }
    if authority(url).is_some_and(|authority| authority.contains('@')) {
        source.problem(path, "a url holds no user and no password", "use token_file, or tls with a ca");
        return None;
    }
    Some(url.to_owned())
}

/// `HOST[:PORT]` of an http or https URL.
fn authority(url: &str) -> Option<&str> {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"))?;
    rest.split(['/', '?', '#']).next().filter(|authority| !authority.is_empty())
}

/// True when a URL stays on this machine.
fn leads_home(url: &str) -> bool {
    let Some(authority) = authority(url) else { return false };
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// How peers pull their topics, which must be served, found, and not by everybody.
pub(super) fn dials(
    source: &mut Source,
    kind: &TopicKind,
    flows: &[FlowName],
    sites: &BTreeMap<String, Option<Site>>,
) -> BTreeMap<FlowName, Dial> {
    let mut dials = BTreeMap::new();
    match kind {
        TopicKind::Embedded | TopicKind::Kafka(_) => return dials,
        TopicKind::Peer => {}
    }
    for flow in flows {
        let (Some(Some(from)), Some(Some(to))) = (sites.get(&flow.from), sites.get(&flow.to)) else { continue };
        serves(source, from);
        if let Some(url) = from.url.clone() {
            let (theirs, own) = (from.tls.clone(), to.tls.clone());
            dials.insert(flow.clone(), Dial { url, token_file: from.token_file.clone(), theirs, own });
        }
    }
    dials
}

fn serves(source: &mut Source, site: &Site) {
    let path = format!("site.{}", site.name);
    for (missing, key, remedy) in [
        (site.listen.is_none(), "listen", "give the address that its node serves at"),
        (site.url.is_none(), "url", "give the URL that its peers dial"),
    ] {
        if missing {
            let what = format!("site {} serves a topic to its peers and has no \"{key}\"", site.name);
            source.problem(&path, what, remedy);
        }
    }
    if site.token_file.is_none() && site.tls.ca.is_none() {
        let what = format!("everybody could read the topic that site {} serves", site.name);
        source.problem(&path, what, "give token_file, or tls with a ca");
    }
    if site.tls.ca.is_some() && site.tls.cert.is_none() {
        let what = format!("site {} can't ask for client certificates without TLS", site.name);
        source.problem(&path, what, "give tls.cert and tls.key");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_urls_are_known() {
        for (url, home) in [
            ("http://127.0.0.1:7800", true),
            ("http://127.8.9.1", true),
            ("http://[::1]:7800", true),
            ("http://localhost:1/x", true),
            ("http://localhost.example:1", false),
            ("http://127.0.0.1.example", false),
            ("http://10.0.0.1:7800", false),
            ("ftp://127.0.0.1", false),
        ] {
            assert_eq!(leads_home(url), home, "{url}");
        }
    }
}

//! Who may ask for what.

use std::net::IpAddr;

use axum::extract::Request;
use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::config::{self, MetricsAccess, Site};
use crate::model::{Code, Fault, Result};

/// How a connection came.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// It showed a certificate that `tls.ca` has signed.
    pub certified: bool,
}

impl Caller {
    /// As the listener noted it; nothing is believed of a request that it did not see.
    pub fn of(request: &Request) -> Self {
        request.extensions().get::<Caller>().copied().unwrap_or(Caller { certified: false })
    }
}

/// What a site demands of its callers. Nothing but health is open where it demands nothing.
#[derive(Clone)]
pub struct Gate {
    /// Hash of the token: comparing hashes of one length tells nothing about the token's own.
    token: Option<[u8; 32]>,
    certificate: bool,
    open_metrics: bool,
}

impl Gate {
    /// Reads the site's token.
    ///
    /// # Errors
    /// `BadSecret`.
    pub fn new(site: &Site) -> Result<Self> {
        let token = site.token_file.as_deref().map(config::read_secret).transpose()?;
        let local = site.listen.is_some_and(|address| is_local(address.ip()));
        Ok(Self {
            token: token.map(|token| Sha256::digest(token.reveal()).into()),
            certificate: site.tls.ca.is_some(),
            open_metrics: match site.metrics {
                MetricsAccess::Local => local,
                MetricsAccess::Open => true,
                MetricsAccess::Authenticated => false,
            },
        })
    }

    /// True when the caller has shown everything that the site demands, and it demands something.
    pub fn admits(&self, caller: Caller, headers: &HeaderMap) -> bool {
        let by_certificate = !self.certificate || caller.certified;
        let by_token = self.token.is_none_or(|token| bears(headers, &token));
        (self.certificate || self.token.is_some()) && by_certificate && by_token
    }

    /// What the others are told.
    pub fn refusal() -> Fault {
        let fault = Fault::new(Code::BadCredentials, "token or client certificate are missing or wrong");
        fault.remedy("see token_file and tls.ca in the pipeline file")
    }

    /// True when the caller may read the metrics.
    pub fn admits_to_metrics(&self, caller: Caller, headers: &HeaderMap) -> bool {
        self.open_metrics || self.admits(caller, headers)
    }
}

fn is_local(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

fn bears(headers: &HeaderMap, token: &[u8; 32]) -> bool {
    let header = headers.get(AUTHORIZATION).and_then(|header| header.to_str().ok()).unwrap_or_default();
    let (scheme, shown) = header.split_once(' ').unwrap_or_default();
    let shown: [u8; 32] = Sha256::digest(shown.trim()).into();
    scheme.eq_ignore_ascii_case("bearer") & bool::from(shown.ct_eq(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_demanded_must_be_shown() {
        let digest = |token: &str| Some(Sha256::digest(token).into());
        let certified = Caller { certified: true };
        let bare = Caller { certified: false };
        for (token, certificate, caller, header, admitted) in [
            (None, false, certified, "", false),
            (digest("t"), false, bare, "", false),
            (digest("t"), false, bare, "Bearer t", true),
            (digest("t"), false, bare, "bearer  t", true),
            (digest("t"), false, bare, "Basic t", false),
            (digest("t"), false, bare, "Bearer tt", false),
            (digest("t"), false, bare, "Bearer", false),
            (None, true, bare, "", false),
            (None, true, certified, "", true),
            (digest("t"), true, certified, "", false),
            (digest("t"), true, bare, "Bearer t", false),
            (digest("t"), true, certified, "Bearer t", true),
        ] {
            let mut headers = HeaderMap::new();
            if !header.is_empty() {
                headers.insert(AUTHORIZATION, header.parse().unwrap());
            }
            let gate = Gate { token, certificate, open_metrics: false };
            assert_eq!(gate.admits(caller, &headers), admitted, "{certificate} {caller:?} {header:?}");
            assert_eq!(gate.admits_to_metrics(caller, &headers), admitted);
        }
    }
}

//! Answers that are not records.

use axum::Json;
use axum::response::{IntoResponse, Response};
use hyper::StatusCode;
use hyper::header::CONTENT_TYPE;
use serde::Serialize;
use uuid::Uuid;

use crate::model::{Class, Code, Fault};
use crate::topic::peer::FLOW_ID;
use crate::topic::peer::frame::fault_to_json;

/// A fault, as the body of an error.
pub struct Refusal(pub Fault);

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self(fault)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match (self.0.code, self.0.class()) {
            (Code::TopicGap, _) => StatusCode::GONE,
            (Code::ForeignPeer, _) => StatusCode::CONFLICT,
            (Code::BadCredentials, _) => StatusCode::UNAUTHORIZED,
            (_, Class::Usage) => StatusCode::BAD_REQUEST,
            (_, Class::Transient) => StatusCode::SERVICE_UNAVAILABLE,
            (_, Class::Failed | Class::Guard) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, [(CONTENT_TYPE, "application/json")], fault_to_json(&self.0)).into_response()
    }
}

/// An object of the protocol, with the identity of the topic that it is about.
pub fn object<T: Serialize>(object: T, flow_id: Option<Uuid>) -> Response {
    let mut response = Json(object).into_response();
    if let Some(value) = flow_id.and_then(|flow_id| flow_id.to_string().parse().ok()) {
        response.headers_mut().insert(FLOW_ID, value);
    }
    response
}

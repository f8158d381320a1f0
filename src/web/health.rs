//! `/livez` and `/readyz`: open to all, so they name flows and reasons, and nothing else.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::StatusCode;

use crate::model::FlowName;
use crate::pipeline::board::{Board, FlowBoard};

/// What health is judged by.
#[derive(Clone)]
pub struct Health {
    /// What the parts of this node say.
    pub board: Board,
    /// Silence after which a flow is dead.
    pub limit: Duration,
}

/// The routes.
pub fn routes(health: Health) -> Router {
    Router::new().route("/livez", get(live)).route("/readyz", get(ready)).with_state(Arc::new(health))
}

async fn live(State(health): State<Arc<Health>>) -> Response {
    answer("live", &health.board.flows(), |flow| flow.dead(health.limit))
}

async fn ready(State(health): State<Arc<Health>>) -> Response {
    answer("ready", &health.board.flows(), |flow| flow.unready(health.limit))
}

/// 200 with one word, or 503 with a line for each reason.
fn answer(word: &str, flows: &[(FlowName, Arc<FlowBoard>)], reasons: impl Fn(&FlowBoard) -> Vec<String>) -> Response {
    let lines = flows
        .iter()
        .flat_map(|(name, flow)| reasons(flow).into_iter().map(move |reason| format!("{name}: {reason}\n")));
    let lines: String = lines.collect();
    match lines.is_empty() {
        true => (StatusCode::OK, format!("{word}\n")).into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, lines).into_response(),
    }
}

//! The Python client of docs/examples, run against this server.

use std::process::Output;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::process::Command;
use tokio::sync::watch;

use super::conformance::{event, row};
use super::server::{Answer, Server, Service, listen};
use super::{ApiError, Caller, ErrorCode, Reply, Request};
use crate::ops::Event;

/// Takes one guest, `web`, and fails to protect it.
struct Fake {
    tag: watch::Sender<Option<String>>,
}

impl Service for Fake {
    async fn handle(self: Arc<Self>, request: Request, _: Caller, answer: Answer) -> Result<Value, ApiError> {
        match request {
            Request::Status { .. } => Ok(json!({ "rows": [row()] })),
            Request::FollowEvents { .. } => {
                answer.send(Reply::Missed(2)).await;
                let mut tag = self.tag.subscribe();
                let tag = tag.wait_for(Option::is_some).await.unwrap().clone();
                let mut operation = event().operation.unwrap();
                operation.tag = tag;
                answer.send(Reply::Event(Event { operation: Some(operation), ..event() })).await;
                Ok(json!({}))
            }
            Request::Protect { domain, tag, target, .. } if domain == "web" => {
                assert_eq!(target.host.as_deref(), Some("hostb"));
                self.tag.send_replace(tag);
                Ok(json!({ "job": 7 }))
            }
            _ => Err(ApiError::new(ErrorCode::NotFound, "No domain is called that")),
        }
    }
}

async fn run(arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = listen(&path).await.unwrap();
    let served = tokio::spawn(Server::default().serve(listener, Arc::new(Fake { tag: watch::Sender::new(None) })));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples/protect.py");
    let output = Command::new("python3").arg(script).args(arguments).env("REMUS_SOCKET", &path).output().await.unwrap();
    served.abort();
    output
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[tokio::test]
async fn the_python_example_follows_its_own_job_to_the_end() {
    let output = run(&["web", "hostb"]).await;
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "the job failed: {text}");
    assert_eq!(text.lines().collect::<Vec<_>>(), ["job 7: protecting web", "(2 events missed)", "    1 job_failed: x"]);
}

#[tokio::test]
async fn the_python_example_shows_status_and_errors() {
    let output = run(&["--status"]).await;
    assert_eq!(
        (output.status.code(), said(&output).trim()),
        (Some(0), "g: primary, protected (protected), copy is 1 ms old")
    );
    let output = run(&["nosuch", "hostb"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("org.remus.Control.NotFound: No domain"), "{}", said(&output));
    assert_eq!(run(&[]).await.status.code(), Some(2));
}

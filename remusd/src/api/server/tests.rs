use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::api::client::Call as ClientCall;
use crate::ops::operation::Progress;

struct Fake;

impl Service for Fake {
    async fn handle(self: Arc<Self>, request: Request, _: Caller, answer: Answer) -> Result<Value, ApiError> {
        match request {
            Request::Status { .. } => {
                answer.send(Reply::Missed(3)).await;
                answer.send(Reply::Progress(Progress::default())).await;
                Ok(json!({ "rows": [] }))
            }
            // Until the client goes away.
            Request::FollowEvents { .. } => {
                while answer.send(Reply::Missed(1)).await {
                    tokio::task::yield_now().await;
                }
                Ok(json!({}))
            }
            _ => Err(ApiError::new(ErrorCode::NotFound, "no")),
        }
    }
}

async fn served() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = listen(&path).await.unwrap();
    tokio::spawn(Server::default().serve(listener, Arc::new(Fake)));
    (dir, path)
}

/// Sends bytes as they are and takes what comes until the daemon hangs up or `replies` messages have come.
async fn raw(path: &Path, bytes: &[u8], replies: usize) -> Vec<Value> {
    let mut stream = UnixStream::connect(path).await.unwrap();
    // The daemon may hang up before all is sent.
    let _ = stream.write_all(bytes).await;
    let mut messages = Messages::new(&mut stream, MAX_MESSAGE);
    let mut got = Vec::new();
    while got.len() < replies
        && let Ok(Some(message)) = messages.next().await
    {
        got.push(serde_json::from_slice(&message).unwrap());
    }
    got
}

fn status(more: &str) -> String {
    format!("{{\"method\":\"org.remus.Control.Status\"{more}}}\0")
}

#[tokio::test]
async fn replies_come_in_order_and_the_last_says_so() {
    let (_dir, path) = served().await;
    let mut call = ClientCall::start(&path, &Request::Status { domain: None }).await.unwrap();
    assert_eq!(call.next().await.unwrap(), Some(Reply::Missed(3)));
    assert_eq!(call.next().await.unwrap(), Some(Reply::Progress(Progress::default())));
    assert_eq!(call.next().await.unwrap(), Some(Reply::Result(json!({ "rows": [] }))));
    let got = raw(&path, status(",\"more\":true").as_bytes(), 3).await;
    assert_eq!(got[0], json!({ "continues": true, "parameters": { "missed": 3 } }));
    assert_eq!(got[2], json!({ "parameters": { "rows": [] } }));
}

#[tokio::test]
async fn who_does_not_ask_for_more_gets_one_reply_and_who_asks_for_none_gets_none() {
    let (_dir, path) = served().await;
    let got = raw(&path, (status("") + &status(",\"oneway\":true") + &status("")).as_bytes(), 2).await;
    assert_eq!(got, [json!({ "parameters": { "rows": [] } }), json!({ "parameters": { "rows": [] } })]);
}

#[tokio::test]
async fn hostile_requests_get_an_error_and_the_daemon_lives() {
    let (_dir, path) = served().await;
    let call = |method: &str, rest: &str| format!("{{\"method\":\"{method}\"{rest}}}\0");
    let deep = format!("{}{}\0", "[".repeat(10_000), "]".repeat(10_000));
    let ours = "org.remus.Control";
    let rows = [
        ("{}\0".to_owned(), "org.remus.Control.Invalid", "method"),
        ("nonsense\0".into(), "org.remus.Control.Invalid", "no varlink call"),
        ("\0".into(), "org.remus.Control.Invalid", "no varlink call"),
        ("\u{ff}\0".into(), "org.remus.Control.Invalid", "no varlink call"),
        (deep, "org.remus.Control.Invalid", "no varlink call"),
        (call(&format!("{ours}.Nonsense"), ""), "org.varlink.service.MethodNotFound", "Nonsense"),
        (call("org.other.Interface.Status", ""), "org.varlink.service.InterfaceNotFound", "org.other.Interface"),
        (call("Status", ""), "org.varlink.service.InterfaceNotFound", "Status"),
        (call(&format!("{ours}.Status"), ",\"parameters\":{\"domian\":\"x\"}"), "org.remus.Control.Invalid", "domian"),
        (call(&format!("{ours}.Status"), ",\"parameters\":{\"domain\":7}"), "org.remus.Control.Invalid", "string"),
        (call(&format!("{ours}.Unprotect"), ""), "org.remus.Control.Invalid", "domain"),
        (call(&format!("{ours}.Status"), ",\"sudo\":true"), "org.remus.Control.Invalid", "sudo"),
        (call(&format!("{ours}.Status"), ",\"upgrade\":true"), "org.remus.Control.Invalid", "upgrade"),
        (call(&format!("{ours}.FollowEvents"), ""), "org.varlink.service.ExpectedMore", ""),
        (call(&format!("{ours}.Jobs"), ""), "org.remus.Control.NotFound", "no"),
    ];
    for (request, error, text) in rows {
        let got = raw(&path, request.as_bytes(), 1).await;
        assert_eq!(got[0]["error"], error, "{request}");
        assert!(got[0]["parameters"].to_string().contains(text), "{request}: {}", got[0]);
    }
    assert_eq!(raw(&path, status("").as_bytes(), 1).await.len(), 1);
}

#[tokio::test]
async fn an_oversized_request_is_refused_without_being_kept() {
    let (_dir, path) = served().await;
    let got = raw(&path, &vec![b' '; MAX_MESSAGE + 8192], 1).await;
    assert_eq!(got[0]["error"], "org.remus.Control.Invalid");
    // A half one, and nothing at all, cost a connection until they hang up.
    drop(UnixStream::connect(&path).await.unwrap());
    assert!(raw(&path, b"{\"method\":", 0).await.is_empty());
    assert_eq!(raw(&path, status("").as_bytes(), 1).await.len(), 1);
}

#[tokio::test]
async fn a_client_that_floods_while_it_is_answered_is_taken_for_gone() {
    let (_dir, path) = served().await;
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"{\"method\":\"org.remus.Control.FollowEvents\",\"more\":true}\0").await.unwrap();
    let (mut read, mut write) = stream.split();
    let mut sink = vec![0; 4096];
    let flood = vec![b'x'; 4 * MAX_MESSAGE];
    let sending = async { write.write_all(&flood).await };
    let reading = async { while matches!(read.read(&mut sink).await, Ok(n) if n > 0) {} };
    let (sent, ()) = tokio::join!(sending, reading);
    assert!(sent.is_err(), "the daemon has closed the connection");
}

#[tokio::test]
async fn two_daemons_do_not_share_a_socket() {
    let (_dir, path) = served().await;
    assert_eq!(listen(&path).await.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
}

#[test]
fn a_user_has_so_many_connections_and_root_any_number() {
    let server = Server::default();
    let held: Vec<_> = (0..PER_USER).map(|_| server.count(1000).unwrap()).collect();
    assert!(server.count(1000).is_none());
    assert!(server.count(1001).is_some() && server.count(0).is_some());
    drop(held);
    assert!(server.count(1000).is_some());
    assert_eq!(server.users.lock().unwrap().len(), 0, "nothing is kept of users without connections");
}

use super::*;
use crate::link::CloseReason;

async fn connect(command: &str, patience: Duration) -> String {
    let key = SessionKey { generation: Generation(1), nonce: Nonce::random() };
    let options = LinkOptions { handshake_timeout: patience, ..LinkOptions::default() };
    let transport = Transport::Command(command.into());
    PrimaryLink::connect(&transport, key, ProtectOffer::example(), &options).await.unwrap_err().to_string()
}

#[tokio::test]
async fn what_the_transport_says_reaches_the_operator() {
    let patience = Duration::from_secs(10);
    let said = connect("echo 'Host key verification failed.' >&2; exit 255", patience).await;
    assert!(said.contains("Host key verification failed.") && said.contains("255"), "{said}");
    let said = connect("echo Welcome to this host", patience).await;
    assert!(said.contains("does not speak remusd's protocol"), "{said}");
    let said = connect("echo 'still thinking' >&2; exec sleep 60", Duration::from_millis(300)).await;
    assert!(said.contains("did not answer") && said.contains("still thinking"), "{said}");
}

#[test]
fn frames_stay_small_and_nothing_is_lost_by_cutting() {
    let entries: Vec<u64> = (0..1000).map(|n| if n % 7 == 0 { n | 0xf << 60 } else { n }).collect();
    let carrying = entries.iter().filter(|entry| PageBatch::has_data(**entry)).count();
    let data: Vec<u8> = (0..carrying * PAGE_SIZE).map(|n| (n / PAGE_SIZE) as u8).collect();
    let batch = PageBatch { entries, data: data.into() };
    let parts = split_pages(batch.clone()).unwrap();
    assert!(parts.iter().all(|part| part.size() + part.entries.len() <= CHUNK));
    assert!(parts.iter().all(|part| part.data.len() == part.data_pages() * PAGE_SIZE));
    assert_eq!(parts.iter().flat_map(|part| part.entries.clone()).collect::<Vec<_>>(), batch.entries);
    assert_eq!(parts.iter().flat_map(|part| part.data.to_vec()).collect::<Vec<_>>(), batch.data);

    let body = Bytes::from(vec![3; 3 * CHUNK]);
    let record = Record { layer: crate::stream::Layer::Libxl, kind: 3, body: body.clone() };
    let parts = split_record(Epoch(1), &record).unwrap();
    assert!(parts.len() == 4 && parts.iter().all(|part| part.data.len() < CHUNK));
    assert_eq!(parts.iter().map(|part| part.offset as usize).collect::<Vec<_>>()[1], parts[0].data.len());
    assert_eq!(split_record(Epoch(1), &Record { body: Bytes::new(), ..record }).unwrap().len(), 1);
}

#[tokio::test]
async fn a_transport_that_dies_in_a_session_is_told_with_its_last_words() {
    // A peer that welcomes everybody: it replays a WELCOME made for the session's key.
    let key = SessionKey { generation: Generation(1), nonce: Nonce(uuid::Uuid::from_u128(3)) };
    let welcome = Frame::Welcome(Welcome {
        version: crate::link::frame::VERSION_MAX,
        capabilities: 0,
        software: "r".into(),
        host: "b".into(),
        wall_clock_ms: 0,
        host_id: uuid::Uuid::nil(),
        knows_record: false,
    });
    let mut bytes = bytes::BytesMut::new();
    crate::link::codec::Encoder::new(key).encode(&welcome, &mut bytes).unwrap();
    let octal: String = bytes.iter().map(|byte| format!("\\{byte:03o}")).collect();
    let command = format!("printf '{octal}'; echo 'Connection reset by peer' >&2; exit 255");
    let transport = Transport::Command(command);
    let options = LinkOptions::default();
    let (_sender, mut events) = PrimaryLink::connect(&transport, key, ProtectOffer::example(), &options).await.unwrap();
    match events.next().await {
        Some(LinkEvent::Closed(CloseReason::Transport { said, .. })) => {
            assert!(said.contains("Connection reset by peer"), "{said}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(events.next().await, None);
}
